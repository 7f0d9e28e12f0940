"""Tuning: the best decision for each kernel of a spec on this machine, into a log.

    search    MetaSchedule's cost model (XGBoost) ranks untried decisions; each trial compiles one,
              compares it with the definition and times it on a workload's real work items
    settle    the best few and the default are built as they will ship and timed in turn

Everything known is in the log, so a tuning that was killed goes on where it stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.final import seconds_apart, settle
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import AnyPath, TuningLog, by_subject, writable_root
from deft_tvm.tuning.probe import kept, known_device
from deft_tvm.tuning.result import KernelResult, Listener, Progress, TuningResult, ignore
from deft_tvm.tuning.run import new_run
from deft_tvm.tuning.runner import LocalRunner, Runner
from deft_tvm.tuning.search import Search
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.subject import Subject, subjects

WORKLOADS = ("few_shot", "sequences", "speculative", "multi_step")
TRIALS = 24
MOST_BUILDERS = 14
"""Each takes a gigabyte, and a container may have fewer cores than it sees."""
TIMING_CORES = 2
"""For the process that launches what a GPU is timed with, and for this one."""


def tune(
    spec: AttentionSpec,
    workloads: Sequence[str] = WORKLOADS,
    *,
    trials: int | None = TRIALS,
    minutes: float | None = None,
    device: DeviceProfile | None = None,
    root: AnyPath | None = None,
    seed: int = 0,
    apart: float | None = None,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> TuningResult:
    """Search until the log holds `trials` trials of the kernels that the workloads launch.

    Args:
        spec: the attention.
        workloads: what to time kernels on, as `workloads.parse` reads them; a kernel is tuned on
            the first one that launches it.
        trials: of all kernels together, earlier ones in the log included; None: all there are. A
            kernel with one decision needs none.
        minutes: after which no further trial is begun; the last measurement comes on top.
        device: by default this machine's CPU, with rates that are measured once and kept beside
            its logs, so that plans stay the same; those of a measured device are kept, too.
        root: folder of logs, by default ``DEFT_TVM_LOGS``, else among the user's data.
        seed: of the search.
        apart: seconds from one pass of the last measurement to the next; by default five, in which
            a shared machine may come to itself, and none on a GPU.
        listener: told how it goes, from the first moment.
        runner: where candidates are compiled and timed, by default this machine, see
            `local_runner`; it stays open.

    Raises:
        TuningError: another tuning writes the same log, or the workers cannot start.
        LogError: the log is of a newer version, or cannot be written.
        WorkloadError: there is no such workload.
    """
    (result,) = tune_all(
        [spec],
        workloads,
        trials=trials,
        minutes=minutes,
        device=device,
        root=root,
        seed=seed,
        apart=apart,
        listener=listener,
        runner=runner,
    )
    return result


def tune_all(
    specs: Sequence[AttentionSpec],
    workloads: Sequence[str] = WORKLOADS,
    *,
    trials: int | None = TRIALS,
    minutes: float | None = None,
    device: DeviceProfile | None = None,
    root: AnyPath | None = None,
    seed: int = 0,
    apart: float | None = None,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> list[TuningResult]:
    """The same for several specs, with `trials` and `minutes` for each.

    They are searched one after the other, and the best ones of all measured in the same passes,
    which so have more time between them.
    """
    begin = time.monotonic()
    slug = (device or DeviceProfile.detect()).slug
    with ExitStack() as held:
        logs = [TuningLog(writable_root(root) / slug / spec.slug) for spec in specs]
        for log in logs:
            held.enter_context(log.only_writer())
        device = kept(device, root) if device else known_device(root, listener=listener)
        listener(Progress("start", "preparing kernels and processes to time them"))
        apart = seconds_apart(apart, device)
        readings = [log.read() for log in logs]
        kernels = [
            kernels_of(spec, workloads, device, reading)
            for spec, reading in zip(specs, readings, strict=True)
        ]
        made = [0] * len(logs)
        unfinished = [n for n in range(len(logs)) if _unfinished(kernels[n], Budget(trials))]
        if unfinished:
            chosen = held.enter_context(opened(runner, device))
            journals: dict[Kernel, Journal] = {}
            for n in unfinished:
                budget = Budget(trials, minutes)
                run = new_run(specs[n], device, chosen, workloads, budget, seed, apart)
                journal = Journal(logs[n], run, kernels[n], budget, listener)
                Search(journal, chosen, seed).run()
                journals.update({k: journal for k in kernels[n] if not k.settled})
                made[n] = journal.new_trials
            settle(journals, chosen, apart)
    seconds = time.monotonic() - begin
    total = sum(len(kernel.tried) for each in kernels for kernel in each)
    text = f"{sum(made)} new trials in {seconds:.0f} s"
    listener(Progress("done", text, total, trials * len(logs) if trials else total))
    return [
        TuningResult(log, device, _results(own), new, reading.skipped, seconds)
        for log, own, new, reading in zip(logs, kernels, made, readings, strict=True)
    ]


def _results(kernels: Iterable[Kernel]) -> dict[str, KernelResult]:
    return {kernel.name: result for kernel in kernels if (result := kernel.result())}


@contextmanager
def opened(runner: Runner | None, device: DeviceProfile) -> Iterator[Runner]:
    """The runner that was given, or one on this machine, which is closed afterwards."""
    if runner is not None:
        yield runner
        return
    with closing(local_runner(device)) as local:
        yield local


def local_runner(device: DeviceProfile) -> LocalRunner:
    """On this machine. Where a GPU is timed, its cores compile for all they are worth."""
    if device.kind == "cpu":
        return LocalRunner()
    cores = len(os.sched_getaffinity(0))
    return LocalRunner(builders=max(1, min(MOST_BUILDERS, cores - TIMING_CORES)))


def kernels_of(
    spec: AttentionSpec, workloads: Sequence[str], device: DeviceProfile, trials: Iterable[Trial]
) -> list[Kernel]:
    """The kernels with something to decide, each on the first workload that launches it."""
    tasks = {task.name: task for task in tasks_for(spec, device)}
    tiles = [task.tile for task in tasks.values() if task.tile is not None]
    chosen: dict[str, Subject] = {}
    for workload in workloads:
        for subject in subjects(spec, workload, tiles, device):
            chosen.setdefault(subject.kernel, subject)
    earlier = by_subject(trials)
    kernels = []
    for name, subject in chosen.items():
        space = Space(subject, tasks[name])
        if len(space) > 1:
            kernels.append(Kernel(space, earlier.get((name, subject.workload), [])))
    return kernels


def _unfinished(kernels: Sequence[Kernel], budget: Budget) -> bool:
    made = sum(len(kernel.tried) for kernel in kernels)
    untried = any(len(kernel.tried) < len(kernel.space) for kernel in kernels)
    return (made < budget.goal(made) and untried) or not all(kernel.settled for kernel in kernels)

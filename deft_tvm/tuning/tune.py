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
from dataclasses import dataclass

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.files import AnyPath
from deft_tvm.schedules import tiles_of
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import DEFAULT_TRIALS, Budget
from deft_tvm.tuning.final import seconds_apart, settle
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import TuningLog, by_subject, writable_root
from deft_tvm.tuning.probe import kept, known_device
from deft_tvm.tuning.result import Listener, Progress, TuningResult, ignore
from deft_tvm.tuning.run import new_run
from deft_tvm.tuning.runner import LocalRunner, Runner
from deft_tvm.tuning.search import Search
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.subject import Subject, subjects

WORKLOADS = ("few_shot", "sequences", "speculative", "multi_step")
MOST_BUILDERS = 14
"""Each takes a gigabyte, and a container may have fewer cores than it sees."""
TIMING_CORES = 2
"""For the process that launches what a GPU is timed with, and for this one."""


def tune(
    specs: Sequence[AttentionSpec],
    workloads: Sequence[str] = WORKLOADS,
    *,
    trials: int | None = DEFAULT_TRIALS,
    minutes: float | None = None,
    device: DeviceProfile | None = None,
    root: AnyPath | None = None,
    seed: int = 0,
    apart: float | None = None,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> list[TuningResult]:
    """Search until each spec's log holds `trials` trials of the kernels that the workloads launch.

    Specs are searched one after the other, and the best ones of all measured in the same passes,
    which so have more time between them.

    Args:
        specs: the attentions, each once.
        workloads: what to time kernels on, as `workloads.parse` reads them; a kernel is tuned on
            the first one that launches it.
        trials: for each spec, of all kernels together, earlier ones in the log included; None: all
            there are. A kernel with one decision needs none.
        minutes: for each spec, after which no further trial is begun; the last measurement comes
            on top.
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
        LogError: a log is of a newer version, or cannot be written.
        WorkloadError: there is no such workload.
    """
    begin = time.monotonic()
    slug = (device or DeviceProfile.detect()).slug
    with ExitStack() as held:
        logs = [TuningLog(writable_root(root) / slug / spec.slug) for spec in specs]
        for log in logs:
            held.enter_context(log.only_writer())
        device = kept(device, root) if device else known_device(root, listener=listener)
        listener(Progress("start", "preparing kernels and processes to time them"))
        tunings = [
            _Tuning.of(spec, log, workloads, device) for spec, log in zip(specs, logs, strict=True)
        ]
        unfinished = [one for one in tunings if one.unfinished(trials)]
        if unfinished:
            apart = seconds_apart(apart, device)
            chosen = held.enter_context(opened(runner, device))
            journals: dict[Kernel, Journal] = {}
            for one in unfinished:
                budget = Budget(trials, minutes)
                run = new_run(one.spec, device, chosen, workloads, budget, seed, apart)
                journal = Journal(one.log, run, one.kernels, budget, listener)
                Search(journal, chosen, seed).run()
                journals.update({k: journal for k in one.kernels if not k.settled})
                one.new_trials = journal.new_trials
            settle(journals, chosen, apart)
    seconds = time.monotonic() - begin
    total = sum(one.made for one in tunings)
    text = f"{sum(one.new_trials for one in tunings)} new trials in {seconds:.0f} s"
    listener(Progress("done", text, total, trials * len(tunings) if trials else total))
    return [one.result(device, seconds) for one in tunings]


@dataclass
class _Tuning:
    """Of one spec.

    Attributes:
        kernels: those with something to decide.
        skipped: lines of its log that could not be read.
        new_trials: of its search.
    """

    spec: AttentionSpec
    log: TuningLog
    kernels: list[Kernel]
    skipped: int
    new_trials: int = 0

    @classmethod
    def of(
        cls, spec: AttentionSpec, log: TuningLog, workloads: Sequence[str], device: DeviceProfile
    ) -> _Tuning:
        reading = log.read()
        return cls(spec, log, kernels_of(spec, workloads, device, reading), reading.skipped)

    @property
    def made(self) -> int:
        """Trials in the log."""
        return sum(len(kernel.tried) for kernel in self.kernels)

    def unfinished(self, trials: int | None) -> bool:
        made = self.made
        untried = any(len(kernel.tried) < len(kernel.space) for kernel in self.kernels)
        short = made < Budget(trials).goal(made) and untried
        return short or not all(kernel.settled for kernel in self.kernels)

    def result(self, device: DeviceProfile, seconds: float) -> TuningResult:
        found = {kernel.name: result for kernel in self.kernels if (result := kernel.result())}
        return TuningResult(self.log, device, found, self.new_trials, self.skipped, seconds)


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
    tiles = tiles_of(tasks.values())
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

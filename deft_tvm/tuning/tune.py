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
from contextlib import closing, contextmanager
from datetime import datetime, timezone

import filelock

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import TuningError
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.log import AnyPath, Trial, TuningLog, by_subject, writable_root
from deft_tvm.tuning.probe import device_file, probe, write_profile
from deft_tvm.tuning.result import Listener, Progress, TuningResult, ignore
from deft_tvm.tuning.runner import LocalRunner, Runner
from deft_tvm.tuning.session import Session
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.subject import Subject, subjects

WORKLOADS = ("few_shot", "sequences", "speculative", "multi_step")
TRIALS = 24


def tune(
    spec: AttentionSpec,
    workloads: Sequence[str] = WORKLOADS,
    *,
    trials: int = TRIALS,
    device: DeviceProfile | None = None,
    root: AnyPath | None = None,
    seed: int = 0,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> TuningResult:
    """Search until the log holds `trials` trials of the kernels that the workloads launch.

    Args:
        spec: the attention.
        workloads: what to time kernels on, as `workloads.parse` reads them; a kernel is tuned on
            the first one that launches it.
        trials: of all kernels together, earlier ones in the log included. A kernel with one
            decision needs none.
        device: by default this machine's CPU, with rates that are measured once and kept.
        root: folder of logs, by default ``DEFT_TVM_LOGS``, else among the user's data.
        seed: of the search.
        listener: told how it goes, from the first moment.
        runner: where candidates are compiled and timed, by default this machine.

    Raises:
        TuningError: another tuning writes the same log, or the workers cannot start.
        LogError: the log is of a newer version.
        WorkloadError: there is no such workload.
    """
    begin = time.monotonic()
    device = device or _known_device(root, listener)
    log = TuningLog(writable_root(root) / device.slug / spec.slug)
    with _only_tuner(log):
        listener(Progress("start", "preparing kernels and processes to time them", trials=trials))
        reading = log.read()
        kernels = _kernels(spec, workloads, device, reading)
        made = 0
        if _unfinished(kernels, trials):
            with closing(runner or LocalRunner()) as chosen:
                session = Session(_run_name(), log, chosen, kernels, trials, listener, seed)
                session.search()
                session.settle()
                made = session.new_trials
    seconds = time.monotonic() - begin
    total = sum(len(kernel.tried) for kernel in kernels)
    listener(Progress("done", f"{made} new trials in {seconds:.0f} s", total, trials))
    results = {kernel.name: result for kernel in kernels if (result := kernel.result())}
    return TuningResult(log, device, results, made, reading.skipped, seconds)


def _known_device(root: AnyPath | None, listener: Listener) -> DeviceProfile:
    """This machine's CPU with its rates, measured the first time."""
    device = DeviceProfile.detect()
    file = device_file(device, root)
    if not file.is_file():
        listener(Progress("device", "measuring what this machine reaches"))
        write_profile(probe(device), root)
    return DeviceProfile.read(file)


@contextmanager
def _only_tuner(log: TuningLog) -> Iterator[None]:
    log.directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(log.directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise TuningError(
            f"another tuning writes {log.directory}; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _kernels(
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


def _unfinished(kernels: Sequence[Kernel], trials: int) -> bool:
    missing = sum(len(kernel.tried) for kernel in kernels) < trials
    untried = any(len(kernel.tried) < len(kernel.space) for kernel in kernels)
    return (missing and untried) or not all(kernel.settled for kernel in kernels)


def _run_name() -> str:
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.getpid()}"

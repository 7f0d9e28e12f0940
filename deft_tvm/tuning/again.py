"""The winners of a log, measured again: by this machine as it is now, and today's code."""

from __future__ import annotations

from pathlib import Path

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.final import measure_alone, seconds_apart
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.log import AnyPath, TuningLog, winner
from deft_tvm.tuning.logged import logged_device, logged_kernels
from deft_tvm.tuning.probe import device_file, write_profile
from deft_tvm.tuning.result import Listener, Progress, ignore
from deft_tvm.tuning.run import new_run
from deft_tvm.tuning.runner import Runner
from deft_tvm.tuning.tune import opened


def measure_again(
    log: TuningLog,
    *,
    kernel: str | None = None,
    workload: str | None = None,
    into: AnyPath,
    apart: float | None = None,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> TuningLog:
    """Measure the winner of each kernel and workload as tuning does at its end.

    Args:
        log: whose winners.
        kernel, workload: only this one.
        into: folder of logs to write to, best one of its own: modules are built from the last
            measurement of a log, and this one knows the winners alone.
        apart: seconds from one pass to the next, as in `tune`.
        listener: told how it goes.
        runner: where candidates are timed, by default this machine; it stays open.

    Returns:
        The log that was written.

    Raises:
        LogError: the log is of another device, has no winner, or a decision that today's schedule
            does not know.
        TuningError: another tuning writes the log.
    """
    device = logged_device(log)
    if runner is None and device.slug != (here := DeviceProfile.detect(device.kind).slug):
        raise LogError(f"{log.directory} is a log of {device.slug}; expected one of {here}")
    kernels = logged_kernels(log, device, kernel, workload)
    winners = {each: _winner(each, log) for each in kernels}
    spec = AttentionSpec.parse(kernels[0].space.subject.spec)
    target = TuningLog(Path(into) / device.slug / spec.slug)
    with target.only_writer(), opened(runner, device) as chosen:
        if not device_file(device, into).is_file():
            write_profile(device, into)
        listener(Progress("start", "preparing processes to time the winners"))
        workloads = list(dict.fromkeys(each.space.subject.workload for each in kernels))
        apart = seconds_apart(apart, device)
        run = new_run(spec, device, chosen, workloads, Budget(trials=0), seed=0, apart=apart)
        journal = Journal(target, run, kernels, Budget(trials=0), listener)
        measure_alone(journal, chosen, winners, apart)
    return target


def _winner(kernel: Kernel, log: TuningLog) -> int:
    good = [trial for trial in kernel.trials if trial.status == "ok"]
    if not good:
        raise LogError(f"{log.path}: no trial of {kernel.name} worked; expected one that did")
    decision = winner(good).decision
    number = kernel.space.number(decision)
    if number is None:
        raise LogError(
            f"{log.path}: {kernel.name} was decided as {decision}, which today's schedule does not "
            f"know; expected {', '.join(kernel.space.table)}: tune again"
        )
    return number

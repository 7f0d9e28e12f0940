"""The winners of a log, measured again: by this machine as it is now, and today's code."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.final import measure_alone, seconds_apart
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.log import TuningLog, winner
from deft_tvm.tuning.logged import logged_device, logged_kernels
from deft_tvm.tuning.probe import device_file, write_profile
from deft_tvm.tuning.result import Listener, Progress, ignore
from deft_tvm.tuning.run import new_run
from deft_tvm.tuning.runner import Runner
from deft_tvm.tuning.tune import opened


def measure_again(
    *logs: TuningLog,
    kernel: str | None = None,
    workload: str | None = None,
    into: AnyPath,
    apart: float | None = None,
    listener: Listener = ignore,
    runner: Runner | None = None,
) -> list[TuningLog]:
    """Measure the winner of each kernel and workload as tuning does at its end.

    Args:
        logs: whose winners, those of all in the same passes; of one device.
        kernel, workload: only this one.
        into: folder of logs to write to, best one of its own: modules are built from the last
            measurement of a log, and this one knows the winners alone.
        apart: seconds from one pass to the next, as in `tune`.
        listener: told how it goes.
        runner: where candidates are timed, by default this machine; it stays open.

    Returns:
        The logs that were written, in the order of `logs`.

    Raises:
        LogError: a log is of another device, has no winner, or a decision that today's schedule
            does not know.
        TuningError: another tuning writes one of the logs.
    """
    device = logged_device(logs[0])
    here = DeviceProfile.detect(device.kind).slug if runner is None else device.slug
    kernels: list[list[Kernel]] = []
    for log in logs:
        if (slug := logged_device(log).slug) != here:
            raise LogError(f"{log.directory} is a log of {slug}; expected one of {here}")
        kernels.append(logged_kernels(log, device, kernel, workload))
    winners = {
        each: _winner(each, log) for log, own in zip(logs, kernels, strict=True) for each in own
    }
    apart = seconds_apart(apart, device)
    with ExitStack() as held:
        specs = [AttentionSpec.parse(own[0].space.subject.spec) for own in kernels]
        targets = [TuningLog(Path(into) / device.slug / spec.slug) for spec in specs]
        for target in targets:
            held.enter_context(target.only_writer())
        chosen = held.enter_context(opened(runner, device))
        if not device_file(device, into).is_file():
            write_profile(device, into)
        listener(Progress("start", "preparing processes to time the winners"))
        journals: dict[Kernel, Journal] = {}
        for spec, target, own in zip(specs, targets, kernels, strict=True):
            workloads = list(dict.fromkeys(each.space.subject.workload for each in own))
            budget = Budget(trials=0)
            run = new_run(spec, device, chosen, workloads, budget, seed=0, apart=apart)
            journals.update(dict.fromkeys(own, Journal(target, run, own, budget, listener)))
        measure_alone(journals, chosen, winners, apart)
    return targets


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

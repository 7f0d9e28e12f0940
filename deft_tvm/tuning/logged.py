"""From a log back to what it tuned: the same kernels, on the same work, with today's schedules."""

from __future__ import annotations

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.schedules import tiles_of
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.log import DEVICE, TuningLog, by_subject
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.subject import subjects


def logged_device(log: TuningLog) -> DeviceProfile:
    """The profile beside a device's logs, by whose rates its plans were made.

    Raises:
        LogError: there is none.
    """
    return DeviceProfile.read(log.directory.resolve().parent / DEVICE)


def logged_kernels(
    log: TuningLog,
    device: DeviceProfile,
    kernel: str | None = None,
    workload: str | None = None,
) -> list[Kernel]:
    """The kernels of a log with their trials, each on each workload that it was tuned on.

    Args:
        kernel, workload: only this one.

    Raises:
        LogError: there is no such trial, or today's plans do not launch the kernel.
    """
    trials = by_subject(log.read())
    wanted = [
        (name, work) for name, work in trials if kernel in (None, name) and workload in (None, work)
    ]
    if not wanted:
        known = ", ".join(f"{name} on {work}" for name, work in trials) or "no trial"
        raise LogError(
            f"{log.path} has nothing of kernel {kernel or 'any'} on {workload or 'any workload'}; "
            f"expected one of: {known}"
        )
    spec = AttentionSpec.parse(next(iter(trials.values()))[0].spec)
    tasks = {task.name: task for task in tasks_for(spec, device)}
    tiles = tiles_of(tasks.values())
    found = []
    for name, work in wanted:
        launched = {each.kernel: each for each in subjects(spec, work, tiles, device)}
        if name not in launched:
            raise LogError(
                f"{log.path}: {name} is not launched on {work}, which launches "
                f"{', '.join(launched)}; expected a log of today's tile classes: tune again"
            )
        found.append(Kernel(Space(launched[name], tasks[name]), trials[name, work]))
    return found

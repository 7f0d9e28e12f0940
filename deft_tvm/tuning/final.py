"""The last measurement: decisions that were chosen already, in turn, and the winner alone.

The best of many noisy measurements looks better than it is (the winner's curse), so what the search
found is not believed but measured afresh, beside the default and in the same rounds. What these say
of the winner flatters it again, and it had other code between its calls: its time is that of a
measurement of its own, which `again` repeats just so.

A shared machine has slow seconds and slow minutes, in which a neighbour takes half of the memory's
bandwidth: rounds are spread over passes some time apart, between which all other kernels have
theirs, and in each round stands what would limit the launch just then. Where tensors and code lie
in memory makes some kernels faster or slower, too, so every pass has new tensors, and where there
is time between passes, a new process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence

from tvm import IRModule

from deft_tvm.device import DeviceProfile
from deft_tvm.limit import PRODUCT
from deft_tvm.schedules import schedule
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.messages import Outcome
from deft_tvm.tuning.passes import ALONE, IN_TURN, SECONDS, WELL_KNOWN
from deft_tvm.tuning.runner import Runner

APART = {"cpu": 5.0, "cuda": 0.0}
"""Seconds from one pass to the next, unless something else is asked for: CPUs have neighbours."""


def seconds_apart(asked: float | None, device: DeviceProfile) -> float:
    """From one pass to the next: what was asked for, or what the device needs."""
    return APART[device.kind] if asked is None else asked


def settle(journals: Mapping[Kernel, Journal], runner: Runner, apart: float) -> None:
    """Measure the finalists of each kernel, then the one that won; record all.

    Args:
        journals: by kernel, where it is recorded; all of one device.
        runner: that measures.
        apart: seconds from the beginning of one pass to that of the next, at least.
    """
    finalists = {kernel: kernel.finalists() for kernel in journals}
    several = {kernel: numbers for kernel, numbers in finalists.items() if len(numbers) > 1}
    _measure(journals, runner, several, apart, alone=False)
    winners = {kernel: kernel.winner for kernel in finalists}
    measure_alone(journals, runner, {k: n for k, n in winners.items() if n is not None}, apart)


def measure_alone(
    journals: Mapping[Kernel, Journal],
    runner: Runner,
    winners: Mapping[Kernel, int],
    apart: float,
) -> None:
    """Measure one decision of each kernel, by its number, and record it."""
    only = {kernel: (number,) for kernel, number in winners.items()}
    _measure(journals, runner, only, apart, alone=True)


def _measure(
    journals: Mapping[Kernel, Journal],
    runner: Runner,
    finalists: Mapping[Kernel, Sequence[int]],
    apart: float,
    alone: bool,
) -> None:
    if not finalists:
        return
    passes: dict[Kernel, list[Sequence[Outcome]]] = {kernel: [] for kernel in finalists}
    modules = {kernel: _modules(kernel, numbers) for kernel, numbers in finalists.items()}
    what, planned = ("the winner", ALONE) if alone else ("the best", IN_TURN)
    (kind,) = {kernel.device_kind for kernel in finalists}  # of one device
    least, most = planned.passes[kind], planned.most[kind]
    unknown, begin = list(finalists), time.monotonic() - apart
    for count in range(1, most + 1):
        time.sleep(max(0.0, begin + apart - time.monotonic()))
        begin, last = time.monotonic(), least if count <= least else most
        if apart:
            runner.renew()
        for kernel in unknown:
            text = f"{kernel.name}: measuring {what} again, pass {count} of {last}"
            journals[kernel].tell("final", text, kernel)
            passes[kernel].append(_pass(kernel, modules[kernel], runner, planned.rounds))
        if count >= least:
            unknown = [kernel for kernel in unknown if not _known(passes[kernel])]
        if not unknown:
            break
    for kernel, numbers in finalists.items():
        for place, number in enumerate(numbers):
            outcomes = [each[place] for each in passes[kernel]]
            journals[kernel].final(kernel, number, outcomes, alone)


def _known(passes: Sequence[Sequence[Outcome]]) -> bool:
    """Whether the times of all that was measured in these passes are known well enough."""
    return all(_error(each) <= WELL_KNOWN for each in zip(*passes, strict=True))


def _error(passes: Sequence[Outcome]) -> float:
    """Standard error of a time, in parts of it; a pass is one sample, by its fastest round.

    In units of the matrix product beside, as `compare` takes it: the clock is not the kernel's.
    """
    logs = [
        math.log(min(outcome.latency_us) / min(outcome.probe_us.get(PRODUCT, (1.0,))))
        for outcome in passes
        if outcome.status == "ok"
    ]
    return statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0


def _modules(kernel: Kernel, numbers: Sequence[int]) -> list[IRModule]:
    """As they will ship: for any shapes, and not for those of the workload alone."""
    return [schedule(kernel.space.task, kernel.space[number])[0].mod for number in numbers]


def _pass(
    kernel: Kernel, modules: Sequence[IRModule], runner: Runner, rounds: int
) -> Sequence[Outcome]:
    """All modules in turn; another try where the machine went away."""
    outcomes: Sequence[Outcome] = ()
    for _ in range(2):
        outcomes = runner.time(modules, kernel.space.subject, SECONDS * len(modules), rounds)
        if all(outcome.status != "lost" for outcome in outcomes):
            break
    return outcomes

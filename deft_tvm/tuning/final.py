"""The last measurement: decisions that were chosen already, again and in turn.

The best of many noisy measurements looks better than it is (the winner's curse), so what the search
found is not believed but measured afresh, beside the default and in the same rounds. A shared
machine has slow moments of ten or twenty seconds, in which a neighbour takes half of the memory's
bandwidth: rounds are spread over passes some time apart, between which the other kernels have
theirs, and in each round stands what would limit the launch just then. Where tensors and code lie
in memory makes some kernels faster or slower, too, so every pass has new tensors, and where there
is time between passes, a new process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from tvm import IRModule

from deft_tvm.device import DeviceProfile
from deft_tvm.schedules import schedule
from deft_tvm.timing import FEWEST_ROUNDS
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.messages import Outcome
from deft_tvm.tuning.runner import Runner

APART = {"cpu": 5.0, "cuda": 0.0}
"""Seconds from one pass to the next, unless something else is asked for: CPUs have neighbours."""

BESIDE_SECONDS = 0.03
"""What a round takes beside the candidates: emptying caches, and the anchor."""


def seconds_apart(asked: float | None, device: DeviceProfile) -> float:
    """From one pass to the next: what was asked for, or what the device needs."""
    return APART[device.kind] if asked is None else asked


def settle(
    journal: Journal,
    runner: Runner,
    finalists: Mapping[Kernel, Sequence[int]],
    apart: float,
) -> None:
    """Measure the finalists of each kernel, by their numbers, and record them.

    Args:
        apart: seconds from the beginning of one pass to that of the next, at least.
    """
    if not finalists:
        return
    passes: dict[Kernel, list[Sequence[Outcome]]] = {kernel: [] for kernel in finalists}
    modules = {kernel: _modules(kernel, numbers) for kernel, numbers in finalists.items()}
    (last,) = {kernel.passes for kernel in finalists}  # of one device
    for count in range(1, last + 1):
        begin = time.monotonic()
        for kernel, numbers in finalists.items():
            text = f"{kernel.name}: measuring the best again, pass {count} of {last}"
            journal.tell("final", text, kernel)
            passes[kernel].append(_measure(kernel, numbers, modules[kernel], runner))
        if apart and count < last:
            runner.renew()
            time.sleep(max(0.0, begin + apart - time.monotonic()))
    for kernel, numbers in finalists.items():
        for place, number in enumerate(numbers):
            journal.final(kernel, number, [outcomes[place] for outcomes in passes[kernel]])


def _modules(kernel: Kernel, numbers: Sequence[int]) -> list[IRModule]:
    """As they will ship: for any shapes, and not for those of the workload alone."""
    return [schedule(kernel.space.task, kernel.space[number])[0].mod for number in numbers]


def _measure(
    kernel: Kernel, numbers: Sequence[int], modules: Sequence[IRModule], runner: Runner
) -> Sequence[Outcome]:
    """One pass; another try where the machine went away."""
    seconds = FEWEST_ROUNDS * _round_seconds(kernel, numbers)
    outcomes: Sequence[Outcome] = ()
    for _ in range(2):
        outcomes = runner.time(modules, kernel.space.subject, seconds, anchored=True)
        if all(outcome.status != "lost" for outcome in outcomes):
            break
    return outcomes


def _round_seconds(kernel: Kernel, numbers: Sequence[int]) -> float:
    known = kernel.tried
    each = [statistics.median(known[number]) for number in numbers if known.get(number)]
    return sum(each) + BESIDE_SECONDS * (len(numbers) + 1)

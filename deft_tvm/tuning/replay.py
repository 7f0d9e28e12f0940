"""Another search on recorded trials: what it would have found, and when. No hardware needed.

A strategy may propose what the log has a result of, and nothing else; so a log in which all
decisions were tried tells the most.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from deft_tvm.errors import LogError
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.search import BATCH
from deft_tvm.tuning.strategy import GreedySearch, Habits, new_cost_model, runner_result

NEAR = 1.05
"""Within 5 % of the best a search has all but arrived."""


@dataclass(frozen=True)
class Replay:
    """What one strategy makes of one kernel's recorded trials.

    Attributes:
        kernel: which.
        strategy: its name in `strategy.HABITS`.
        best: after each trial the best so far over the best recorded, the median of all seeds.
        to_near: trials until `NEAR` the best recorded, of each seed.
    """

    kernel: str
    strategy: str
    best: tuple[float, ...]
    to_near: tuple[int, ...]


def replay(kernel: Kernel, name: str, habits: Habits, seeds: Sequence[int]) -> Replay:
    """Search among the recorded trials of `kernel`, once for each seed.

    Raises:
        LogError: none of them worked.
    """
    if not any(kernel.tried.values()):
        raise LogError(f"no trial of {kernel.name} worked; expected one that did")
    curves = [_curve(kernel, habits, seed) for seed in seeds]
    arrived = tuple(next(i for i, y in enumerate(curve, 1) if y <= NEAR) for curve in curves)
    median = tuple(statistics.median(each) for each in zip(*curves, strict=True))
    return Replay(kernel.name, name, median, arrived)


def _curve(kernel: Kernel, habits: Habits, seed: int) -> list[float]:
    recorded = kernel.tried
    search = GreedySearch(kernel.space, {}, _unheard, seed, habits, list(recorded))
    context = kernel.space.context(search)
    context.pre_tuning(len(recorded), BATCH, [], None, new_cost_model())
    order: list[int] = []
    while candidates := context.generate_measure_candidates():
        order += search.proposed
        results = [runner_result(recorded[number]) for number in search.proposed]
        context.notify_runner_results(candidates, results)
    medians = [statistics.median(recorded[n]) if recorded[n] else float("inf") for n in order]
    lowest = list(accumulate(medians, min))
    return [each / lowest[-1] for each in lowest]


def _unheard(number: int, error: str) -> None:
    """A recorded decision that is declined today counts as one that failed."""

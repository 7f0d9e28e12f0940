"""How long a search goes on, and how many trials each kernel gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Key = TypeVar("Key")

DEFAULT_TRIALS = 24
"""Of each kernel, where neither trials nor minutes are asked for."""
STRETCH = 16
"""Trials between two divisions among the kernels, where only time ends the search."""


@dataclass
class Budget:
    """Trials, minutes, or the first of both to be spent; neither: every decision is tried.

    Attributes:
        trials: that the log shall hold, those made already included.
        minutes: from now on.
        clock: seconds, from any origin.
    """

    trials: int | None = None
    minutes: float | None = None
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    @property
    def late(self) -> bool:
        """The minutes are over."""
        return self.minutes is not None and self.clock() - self.begun >= 60 * self.minutes

    def goal(self, made: int) -> int:
        """Trials to go for next, given those in the log."""
        return made + STRETCH if self.trials is None else self.trials

    def seconds_left(self, made: int, new: int) -> float | None:
        """Of the search, as fast as it was so far; None while that cannot be told.

        Args:
            made: trials in the log.
            new: those of them since the beginning.
        """
        spent = self.clock() - self.begun
        bounds = []
        if self.minutes is not None:
            bounds.append(60 * self.minutes - spent)
        if self.trials is not None and new:
            bounds.append(spent / new * (self.trials - made))
        return max(0.0, min(bounds)) if bounds else None


def allot(
    trials: int, weights: Mapping[Key, float], made: Mapping[Key, int], most: Mapping[Key, int]
) -> dict[Key, int]:
    """Further trials of each kernel, so that all have `trials` together.

    They go one by one to the kernel with the most weight for a trial (the highest averages of
    D'Hondt), so that trials follow the share of time, and none gets more than it has decisions.

    Args:
        trials: that all kernels shall have, those made already included.
        weights: seconds that each kernel takes in the workload.
        made: trials that each has already.
        most: decisions that each has.
    """
    has = dict(made)
    for _ in range(trials - sum(made.values())):
        open_ = [key for key in weights if has[key] < most[key]]
        if not open_:
            break
        has[max(open_, key=lambda key: weights[key] / (has[key] + 1))] += 1
    return {key: has[key] - made[key] for key in weights}

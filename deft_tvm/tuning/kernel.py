"""A kernel in the tuner: its decisions, and what the log says of them."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import chosen, rivals
from deft_tvm.tuning.passes import ALONE
from deft_tvm.tuning.result import KernelResult
from deft_tvm.tuning.space import Space

FINALISTS = 5

TIMES_LOST = 2
"""So often a decision may lose its machine before that counts as its own fault."""


@dataclass(eq=False)
class Kernel:
    """One kernel on its workload, and its trials.

    Attributes:
        space: its decisions.
        trials: all in the log, of this kernel and workload.
        search: the strategy that proposes further ones.
        context: MetaSchedule's, around `search`.
    """

    space: Space
    trials: list[Trial]
    search: Any = None
    context: Any = None

    @property
    def name(self) -> str:
        return self.space.subject.kernel

    @property
    def tried(self) -> dict[int, tuple[float, ...]]:
        """Seconds of each decision tried, by its number; none where it failed."""
        searched = [(self.space.number(t.decision), t) for t in self.trials if not t.final]
        lost = Counter(number for number, trial in searched if trial.status == "lost")
        return {
            number: tuple(us * 1e-6 for us in trial.latency_us)
            for number, trial in searched
            if number is not None and (trial.status != "lost" or lost[number] >= TIMES_LOST)
        }

    @property
    def refused(self) -> set[int | None]:
        """Numbers of the decisions that the schedule declined."""
        return {self.space.number(t.decision) for t in self.trials if t.status == "refused"}

    @property
    def good(self) -> list[Trial]:
        """Trials that worked, of decisions that the schedule still knows."""
        return [
            trial
            for trial in self.trials
            if trial.status == "ok" and self.space.number(trial.decision) is not None
        ]

    @property
    def best_us(self) -> float | None:
        return min((trial.median_us for trial in self.good), default=None)

    @property
    def default_us(self) -> float | None:
        """Of the default decision, where the one that was chosen was measured."""
        default = self.space[self.space.start]
        found = [trial.median_us for trial in rivals(self.good) if trial.decision == default]
        return found[-1] if found else None

    @property
    def gain(self) -> float | None:
        """The default's time in parts of the chosen one's, both of the last measurement in turn.

        Times of the search are not divided: each is of another moment.
        """
        default = self.default_us
        if default is None or not any(trial.final for trial in self.good):
            return None
        return default / chosen(self.good).median_us

    @cached_property
    def limit_us(self) -> float:
        """What its launch cannot be faster than by the device's rates."""
        tile, device = self.space.subject.tile, self.space.subject.device
        operand = "float32" if tile is None else tile.operand
        return round(1e6 * self.space.subject.launch().limit.on(device, operand), 3)

    @property
    def device_kind(self) -> str:
        return self.space.subject.device.kind

    @property
    def settled(self) -> bool:
        """Nothing was tried since the best ones were measured again, or nothing can be.

        A winner that was not measured alone, or in fewer passes, as by older versions, counts as
        not measured.
        """
        if not self.good:
            return True
        last, count = self.trials[-1], ALONE.passes[self.device_kind]
        return last.alone and last.status == "ok" and len(last.passes) >= count

    @property
    def winner(self) -> int | None:
        """Number of the decision that was chosen."""
        return self.space.number(chosen(self.good).decision) if self.good else None

    def finalists(self) -> list[int]:
        """Numbers of the best decisions, and of the default if it works."""
        seconds = {number: statistics.median(s) for number, s in self.tried.items() if s}
        ranked = sorted(seconds, key=seconds.__getitem__)
        default = [self.space.start] if self.space.start in seconds else []
        return list(dict.fromkeys([*ranked[:FINALISTS], *default]))

    def result(self) -> KernelResult | None:
        if not self.good:
            return None
        best = chosen(self.good)
        return KernelResult(
            self.name,
            self.space.subject.workload,
            best.decision,
            best.median_us,
            self.default_us,
            self.limit_us,
            len(self.tried),
            len(self.space),
        )

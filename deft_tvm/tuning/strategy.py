"""The search, as a strategy of MetaSchedule: epsilon-greedy over a pool that the cost model ranks.

Spaces here are small (tens to thousands of decisions) and trials dear, so nothing is tried twice.
The first batch is the default decision. Every later one is drawn from a pool of decisions that were
never tried, half at random, half one step away from the best; most places go to those that the cost
model likes best, some to chance. What is proposed depends only on the seed and on what was tried
before, so that a search that is resumed goes on as it would have.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from deft_tvm import interruption
from deft_tvm.tuning.space import Space

POOL = 16
BEST = 4
MOST_TAUGHT = 128
"""Of earlier trials, the last that the cost model learns; each takes some 50 ms (AMD EPYC Zen 4,
2026-11-21)."""

FEWEST_TO_RANK = 4
"""Trials below which the cost model is not asked."""

Refuse = Callable[[int, str], None]


@dataclass(frozen=True)
class Habits:
    """How a search goes about it.

    Attributes:
        near: part of the pool that lies one step from the best, while the rest is random.
        chance: part of a batch that chance takes from the pool, and not the cost model.
    """

    near: float
    chance: float


GREEDY = Habits(near=0.5, chance=0.2)
HABITS = {"greedy": GREEDY, "climbing": Habits(near=0.9, chance=1), "random": Habits(0, 1)}
"""By name; ``greedy`` is the one that tunes, the others are there to be replayed beside it."""


@derived_object
class GreedySearch(ms.search_strategy.PySearchStrategy):
    """Proposes decisions of one space.

    Args:
        space: the decisions.
        past: seconds of earlier trials by the decision's number; none for one that failed.
        refuse: told of a decision that the schedule declines, and why; it counts as tried.
        seed: another one, another order.
        habits: how it searches.
        among: numbers of the decisions that may be proposed, by default all.
    """

    def __init__(
        self,
        space: Space,
        past: Mapping[int, Sequence[float]],
        refuse: Refuse,
        seed: int = 0,
        habits: Habits = GREEDY,
        among: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.space, self.refuse, self.seed, self.habits = space, refuse, seed, habits
        self.numbers = range(len(space)) if among is None else among
        self.allowed = frozenset(self.numbers)
        self.tried = dict(past)
        self.proposed: list[int] = []
        self.untaught = list(past)[-MOST_TAUGHT:]
        self.left = self.batch = 0
        self.context: Any = None
        self.cost_model: Any = None

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        self.context = context

    def pre_tuning(
        self,
        max_trials: int,
        num_trials_per_iter: int,
        design_spaces: Sequence[Any],
        database: ms.database.Database | None = None,
        cost_model: ms.CostModel | None = None,
    ) -> None:
        """Allow `max_trials` more, and teach the cost model what is known already."""
        self.left, self.batch, self.cost_model = max_trials, num_trials_per_iter, cost_model
        untaught = self.untaught if cost_model is not None else []
        known = [(n, c) for n in untaught if (c := self._candidate(n)) is not None]
        if cost_model is not None and known:
            results = [runner_result(self.tried[number]) for number, _ in known]
            cost_model.update(self.context, [candidate for _, candidate in known], results)
        self.untaught = []

    def post_tuning(self) -> None:
        """Nothing is left to do."""

    def generate_measure_candidates(self) -> list[ms.MeasureCandidate] | None:
        """The next batch; None once all trials are spent or all decisions tried."""
        rng = random.Random(f"{self.seed} {len(self.tried)}")
        start = self.space.start
        wanted = min(self.left, self.batch)
        chosen: dict[int, ms.MeasureCandidate] = {}
        while wanted and not chosen and self._untried():
            first = start in self.allowed and start not in self.tried
            numbers = [start] if first else self._pool(rng)
            pool = {n: c for n in numbers if (c := self._candidate(n)) is not None}
            chosen = {number: pool[number] for number in self._pick(pool, wanted, rng)}
        self.proposed = list(chosen)
        return list(chosen.values()) or None

    def notify_runner_results(
        self, measure_candidates: Sequence[ms.MeasureCandidate], results: Sequence[Any]
    ) -> None:
        """Remember the batch and teach it to the cost model."""
        for number, result in zip(self.proposed, results, strict=True):
            self.tried[number] = tuple(float(seconds) for seconds in result.run_secs or ())
        self.left -= len(results)
        if self.cost_model is not None:
            self.cost_model.update(self.context, list(measure_candidates), list(results))

    def clone(self) -> Any:
        """The same search from its start."""
        return GreedySearch(
            self.space, self.tried, self.refuse, self.seed, self.habits, self.numbers
        )

    def _candidate(self, number: int) -> ms.MeasureCandidate | None:
        try:
            with interruption.kept():
                return self.space.candidate(number)
        except Exception as error:
            if number not in self.tried:
                self.tried[number] = ()
                self.refuse(number, f"{type(error).__name__}: {error}")
            return None

    def _pool(self, rng: random.Random) -> list[int]:
        """Untried decisions: random ones and steps from the best."""
        if self._untried() <= POOL:
            return [number for number in self.numbers if number not in self.tried]
        good = [number for number, seconds in self.tried.items() if seconds]
        good.sort(key=lambda number: statistics.median(self.tried[number]))
        pool: dict[int, None] = {}
        for _ in range(POOL):
            near = good and rng.random() < self.habits.near
            parent = rng.choice(good[:BEST]) if near else None
            guess = rng.choice(self.numbers)
            number = guess if parent is None else self.space.neighbour(parent, rng)
            if number not in self.tried and number in self.allowed:
                pool[number] = None
        return list(pool)

    def _untried(self) -> int:
        """How many decisions may yet be proposed."""
        return len(self.numbers) - len(self.allowed & self.tried.keys())

    def _pick(
        self, pool: Mapping[int, ms.MeasureCandidate], wanted: int, rng: random.Random
    ) -> list[int]:
        numbers = list(pool)
        rng.shuffle(numbers)
        unranked = len(self.tried) < FEWEST_TO_RANK or self.habits.chance >= 1
        if len(numbers) <= wanted or unranked or self.cost_model is None:
            return numbers[:wanted]
        scores = self.cost_model.predict(self.context, [pool[number] for number in numbers])
        ranked = [numbers[place] for place in np.argsort(-np.asarray(scores), kind="stable")]
        picked: list[int] = []
        while len(picked) < wanted:
            rest = [number for number in ranked if number not in picked]
            by_chance = rng.random() < self.habits.chance
            picked.append(rng.choice(rest) if by_chance else rest[0])
        return picked


def new_cost_model() -> ms.CostModel:
    """MetaSchedule's model on XGBoost, untaught.

    On one core: with the few hundred rows of these spaces XGBoost's threads only wait for each
    other, thirty times as long as the work takes.
    """
    return ms.cost_model.XGBModel(num_warmup_samples=FEWEST_TO_RANK, num_tuning_cores=1)


def runner_result(seconds: Sequence[float]) -> ms.runner.RunnerResult:
    """As MetaSchedule's runners give it; no seconds: the candidate failed."""
    return ms.runner.RunnerResult([*seconds] or None, None if seconds else "failed")

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
from typing import Any

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from deft_tvm.tuning.space import Space

POOL = 16
BEST = 4
EPSILON = 0.2
MOST_TAUGHT = 128
"""Of earlier trials, the last that the cost model learns; each takes some 50 ms."""

FEWEST_TO_RANK = 4
"""Trials below which the cost model is not asked."""

Refuse = Callable[[int, str], None]


@derived_object
class GreedySearch(ms.search_strategy.PySearchStrategy):
    """Proposes decisions of one space.

    Args:
        space: the decisions.
        past: seconds of earlier trials by the decision's number; none for one that failed.
        refuse: told of a decision that the schedule declines, and why; it counts as tried.
        seed: another one, another order.
    """

    def __init__(
        self, space: Space, past: Mapping[int, Sequence[float]], refuse: Refuse, seed: int = 0
    ) -> None:
        super().__init__()
        self.space, self.refuse, self.seed = space, refuse, seed
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
        known = [(n, c) for n in self.untaught if (c := self._candidate(n)) is not None]
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
        while wanted and not chosen and len(self.tried) < len(self.space):
            numbers = [start] if start not in self.tried else self._pool(rng)
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
        return GreedySearch(self.space, self.tried, self.refuse, self.seed)

    def _candidate(self, number: int) -> ms.MeasureCandidate | None:
        try:
            return self.space.candidate(number)
        except Exception as error:
            if number not in self.tried:
                self.tried[number] = ()
                self.refuse(number, f"{type(error).__name__}: {error}")
            return None

    def _pool(self, rng: random.Random) -> list[int]:
        """Untried decisions: random ones and steps from the best."""
        if len(self.space) - len(self.tried) <= POOL:
            return [number for number in range(len(self.space)) if number not in self.tried]
        good = [number for number, seconds in self.tried.items() if seconds]
        good.sort(key=lambda number: statistics.median(self.tried[number]))
        pool: dict[int, None] = {}
        for _ in range(POOL):
            parent = rng.choice(good[:BEST]) if good and rng.random() < 0.5 else None
            guess = rng.randrange(len(self.space))
            number = guess if parent is None else self.space.neighbour(parent, rng)
            if number not in self.tried:
                pool[number] = None
        return list(pool)

    def _pick(
        self, pool: Mapping[int, ms.MeasureCandidate], wanted: int, rng: random.Random
    ) -> list[int]:
        numbers = list(pool)
        rng.shuffle(numbers)
        if len(numbers) <= wanted or len(self.tried) < FEWEST_TO_RANK or self.cost_model is None:
            return numbers[:wanted]
        scores = self.cost_model.predict(self.context, [pool[number] for number in numbers])
        ranked = [numbers[place] for place in np.argsort(-np.asarray(scores), kind="stable")]
        picked: list[int] = []
        while len(picked) < wanted:
            rest = [number for number in ranked if number not in picked]
            picked.append(rng.choice(rest) if rng.random() < EPSILON else rest[0])
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

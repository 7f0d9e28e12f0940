"""How much faster, and whether chance explains it.

Rounds of one pass share their minute of a shared machine, their process and the place of their
tensors in memory. They are not independent: a pass is one sample, by its fastest round, since a
neighbour slows many rounds and seldom every one of a pass.

What is left is what whole passes share. The clock: times are taken in units of a matrix product
that was timed in the same rounds. The memory: some kernels wait for it and most do not, so that
dividing by the bandwidth of the hour would add its noise to those that do not. How much a kernel
follows it is learned from the passes of both logs (analysis of covariance; Rutherford, *ANOVA and
ANCOVA*, chapter 4), and what the bandwidth explains is taken away.

p values are Mann and Whitney's over the passes, corrected for the number of rows after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm, t

from deft_tvm.limit import PRODUCT, READ
from deft_tvm.timing import Summary

FEWEST = 6
"""Samples below which nothing is tested: with five of each the least p is 0.008, before Holm."""
FEWEST_LEARNED = 20
"""Samples of both logs from which the part of the bandwidth is learned."""
ALIKE = 0.02
"""Change that no p speaks for: code lies elsewhere, or a neighbour stays. With nothing changed,
passes ten minutes apart, of 19 kernels, differed by up to 3 % and mostly by less than 1 (AMD EPYC
Zen 4, two virtual cores, 2026-11-27)."""

LIMIT = "limit"
"""Name of the only anchor in old logs: the larger of both probes, scaled to the launch."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Times of one kernel, in any unit.

    Attributes:
        values: of each round.
        passes: rounds of each pass, in order; without passes each round is one.
        beside: by name, what was timed in the same rounds.
    """

    values: Floats
    passes: tuple[int, ...]
    beside: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        passes: Sequence[int] = (),
        beside: Mapping[str, Sequence[float]] | None = None,
    ) -> Samples:
        """Where passes do not fit the rounds, they are not believed; nor is what was beside."""
        count = len(values)
        fits = sum(passes) == count and all(passes)
        return cls(
            np.asarray(values, np.float64),
            tuple(passes) if fits else (1,) * count,
            {n: np.asarray(x, np.float64) for n, x in (beside or {}).items() if len(x) == count},
        )

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @cached_property
    def fastest(self) -> Floats:
        """float64[passes], logarithms."""
        return self._fastest(self.values)

    def fastest_beside(self, name: str) -> Floats:
        """The same of what was timed beside."""
        return self._fastest(self.beside[name])

    def _fastest(self, values: Floats) -> Floats:
        ends = np.cumsum(self.passes)[:-1]
        return np.log([part.min() for part in np.split(values, ends)])


@dataclass(frozen=True)
class Change:
    """Of one row.

    Attributes:
        ratio: time after over time before, 1.1 is 10 % slower; with its 95 % interval.
        p: two-sided, of a change beyond `ALIKE`; None with too few samples to say.
    """

    ratio: Summary
    p: float | None


def change(before: Samples, after: Samples) -> Change:
    """What changed from one measurement to another, whose machine may have changed as well."""
    one, other = _in_parts(before, after)
    follows, moved, spread = _followed(before, after, one, other)
    one, other = one - follows * moved[0], other - follows * moved[1]
    middle = float(other.mean() - one.mean())
    half = _half_width(one, other, moved, spread)
    ratio = Summary(*(math.exp(x) for x in (middle, middle - half, middle + half)))
    return Change(ratio, _p_value(one, other, middle))


def mean_ratio(ratios: Sequence[Summary]) -> Summary | None:
    """Geometric mean of one ratio or more, with its 95 % interval as rows are independent."""
    if not ratios:
        return None
    half = norm.ppf(0.975)
    logs = [(math.log(r.median), math.log(r.high / r.low) / (2 * half)) for r in ratios]
    middle = sum(log for log, _ in logs) / len(logs)
    error = half * math.sqrt(sum(deviation**2 for _, deviation in logs)) / len(logs)
    return Summary(math.exp(middle), math.exp(middle - error), math.exp(middle + error))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values as large as they are when all of these are looked at (Holm 1979)."""
    tested = sorted((p, place) for place, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = least
    return adjusted


def comparable(before: Samples, after: Samples) -> str | None:
    """What both logs timed beside, in whose parts they are compared; None: in plain time."""
    both = set(before.beside) & set(after.beside)
    return next((unit for unit in (PRODUCT, LIMIT) if unit in both), None)


def _in_parts(before: Samples, after: Samples) -> list[Floats]:
    """Logarithms of each pass, in units of what both logs timed beside."""
    unit = comparable(before, after)
    return [x.fastest - (x.fastest_beside(unit) if unit else 0.0) for x in (before, after)]


def _followed(
    before: Samples, after: Samples, one: Floats, other: Floats
) -> tuple[float, tuple[Floats, Floats], float]:
    """How far the kernel follows the time of reading, from 0 to 1.

    Returns:
        That share, reading of each pass as `_in_parts` has the kernel, and the sum of squares by
        which it moved within the logs; 0 where nothing can be learned.
    """
    still = np.zeros_like(one), np.zeros_like(other)
    known = {READ, PRODUCT} <= set(before.beside) & set(after.beside)
    if not known or len(before) + len(after) < FEWEST_LEARNED:
        return 0.0, still, 0.0
    reading = [x.fastest_beside(READ) - x.fastest_beside(PRODUCT) for x in (before, after)]
    within = np.concatenate([each - each.mean() for each in reading])
    own = np.concatenate([one - one.mean(), other - other.mean()])
    spread = float(within @ within)
    if spread == 0:
        return 0.0, still, 0.0
    share = min(1.0, max(0.0, float(within @ own) / spread))
    return share, (reading[0], reading[1]), spread


def _half_width(one: Floats, other: Floats, moved: tuple[Floats, Floats], spread: float) -> float:
    """Of the 95 % interval of the difference; wider the further reading lay apart."""
    freedom = len(one) + len(other) - 2 - (spread > 0)
    if freedom < 1:  # one sample each tells no spread
        return 0.0
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in (one, other))
    apart = float(moved[1].mean() - moved[0].mean())
    leverage = 1 / len(one) + 1 / len(other) + (apart**2 / spread if spread else 0.0)
    return float(t.ppf(0.975, freedom)) * math.sqrt(squares / freedom * leverage)


def _p_value(one: Floats, other: Floats, middle: float) -> float | None:
    """Mann and Whitney's, of a change in the direction of `middle`, by more than `ALIKE`."""
    if min(len(one), len(other)) < FEWEST:
        return None
    direction = math.copysign(1.0, middle)
    found = mannwhitneyu(
        direction * other - math.log1p(ALIKE), direction * one, alternative="greater"
    )
    return min(1.0, 2 * float(found.pvalue))

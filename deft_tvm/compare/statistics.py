"""How much faster, and whether chance explains it.

Rounds of one pass share their minute of a shared machine, their process and the place of their
tensors in memory. They are not independent: a pass is one sample, by its fastest round, since a
neighbour slows many rounds and seldom every one of a pass.

What is left is what whole passes share. The clock: times are taken in units of a matrix product
that was timed in the same rounds. The memory: some kernels wait for it and most do not, so that
dividing by the bandwidth of the hour would add its noise to those that do not. How much a kernel
follows it is learned from the passes of both logs (analysis of covariance; Rutherford, *ANOVA and
ANCOVA*, chapter 4), and what the bandwidth explains is taken away.

An hour of a machine moves all kernels together by a few percent, beyond what product and bandwidth
tell. What most rows have in common is therefore no change of one of them: each is also compared
with that taken away, where it is so little that no row would be called changed for it alone. That
only ever takes a verdict back: a changed row has changed either way.

p values are the larger of Mann and Whitney's over the passes and Student's, which knows that what
was learned may be off; they are corrected for the number of rows after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm, t

from deft_tvm.limit import PRODUCT, READ
from deft_tvm.timing import Summary

LEAST_P = 0.005
"""Where Mann and Whitney's p cannot be less, as of five passes and five, nothing is tested: ten
rows at once would never be believed."""
FEWEST_LEARNED = 20
"""Samples of both logs from which the part of the bandwidth is learned."""
ALIKE = 0.01
"""Change that no p speaks for: code lies elsewhere, or a neighbour stays. Ten kernels were measured
nine times in a day with nothing changed, and moved by 2.9 % (root mean square). Of the 72 pairs of
measurements, each way, 2 then have a kernel that is called different, and 581 of 720 kernels are
found that are 10 % slower; with 0.02 none, and 528; with 0 it is 2 and 605 (AMD EPYC Zen 4, two
virtual cores, 2026-11-28)."""

FEWEST_ROWS = 5
"""From which it is told what most have in common."""

NEVER_MOVED = 1e-12
"""Sum of squares of logarithms that is rounding alone."""

LIMIT = "limit"
"""Name of the only anchor in old logs: the larger of both probes, scaled to the launch."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Times of one kernel, in any unit.

    Attributes:
        values: of each round.
        passes: rounds of each pass, in order.
        beside: by name, what was timed in the same rounds.
    """

    values: Floats
    passes: tuple[int, ...]
    beside: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        values: Sequence[float] | Floats,
        passes: Sequence[int] = (),
        beside: Mapping[str, Sequence[float]] | None = None,
    ) -> Samples:
        """Without passes, or where these do not fit, all rounds are one; what was beside and does
        not fit is left out."""
        count = len(values)
        fits = sum(passes) == count and all(passes)
        return cls(
            np.asarray(values, np.float64),
            tuple(passes) if fits else (count,),
            {n: np.asarray(x, np.float64) for n, x in (beside or {}).items() if len(x) == count},
        )

    def beside_only(self, beside: Mapping[str, Sequence[float]]) -> Samples:
        """The same times beside something else."""
        return Samples.of(self.values, self.passes, beside)

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def fastest(self, rounds: int, beside: str | None = None) -> Floats:
        """float64[passes], logarithms: the fastest of so many rounds of each pass, of the kernel or
        of what was timed beside. Of more rounds the fastest is faster."""
        values = self.values if beside is None else self.beside[beside]
        ends = np.cumsum(self.passes)[:-1]
        return np.log([part[:rounds].min() for part in np.split(values, ends)])


@dataclass(frozen=True)
class Change:
    """Of one row.

    Attributes:
        ratio: time after over time before, 1.1 is 10 % slower; with its 95 % interval.
        p: two-sided, of a change beyond `ALIKE`; None with too few samples to say.
    """

    ratio: Summary
    p: float | None


def shared(ratios: Sequence[Summary], most: float) -> float:
    """Logarithm of what most rows have in common beyond `ALIKE`, for which each is excused already;
    0 of few rows, and where they share a ratio of more than `most`, which is news."""
    if len(ratios) < FEWEST_ROWS:
        return 0.0
    middle = float(np.median([math.log(ratio.median) for ratio in ratios]))
    if abs(middle) > math.log(most):
        return 0.0
    return math.copysign(max(0.0, abs(middle) - math.log1p(ALIKE)), middle)


def change(before: Samples, after: Samples, common: float = 0.0) -> Change:
    """What changed from one measurement to another, whose machine may have changed as well.

    Args:
        before, after: the measurements.
        common: logarithm of a ratio, to be taken away, see `shared`.
    """
    rounds = min(*before.passes, *after.passes)
    unit = common_unit(before, after)
    one, other = (
        x.fastest(rounds) - (x.fastest(rounds, unit) if unit else 0.0) for x in (before, after)
    )
    reading = _Reading.learned(before, after, one, other, rounds)
    if reading is not None:
        one, other = one - reading.explains[0], other - reading.explains[1]
    other = other - common
    middle = float(other.mean() - one.mean())
    error, freedom = _standard_error(one, other, reading)
    half = float(t.ppf(0.975, freedom)) * error if freedom else 0.0
    ratio = Summary(*(math.exp(x) for x in (middle, middle - half, middle + half)))
    return Change(ratio, _p_value(one, other, middle, error, freedom))


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


def common_unit(before: Samples, after: Samples) -> str | None:
    """What both logs timed beside, in whose parts they are compared; None: in plain time."""
    both = set(before.beside) & set(after.beside)
    return next((unit for unit in (PRODUCT, LIMIT) if unit in both), None)


@dataclass(frozen=True)
class _Reading:
    """What the memory's bandwidth explains.

    Attributes:
        explains: of each pass of both logs, to be taken away from it.
        apart: logarithm of how much longer reading took after than before.
        spread: sum of the squares by which it moved within the logs.
    """

    explains: tuple[Floats, Floats]
    apart: float
    spread: float

    @classmethod
    def learned(
        cls, before: Samples, after: Samples, one: Floats, other: Floats, rounds: int
    ) -> _Reading | None:
        """From how the kernel followed it from pass to pass, not at all to in full.

        Learned from plain times of reading: in units of the product they would share its noise
        with the kernel's. None where there is too little to learn from.
        """
        known = {READ, PRODUCT} <= set(before.beside) & set(after.beside)
        if not known or len(before) + len(after) < FEWEST_LEARNED:
            return None
        plain = [x.fastest(rounds, READ) for x in (before, after)]
        within = np.concatenate([each - each.mean() for each in plain])
        own = np.concatenate([one - one.mean(), other - other.mean()])
        spread = float(within @ within)
        if spread < NEVER_MOVED:
            return None
        follows = min(1.0, max(0.0, float(within @ own) / spread))
        moved = [
            each - x.fastest(rounds, PRODUCT)
            for each, x in zip(plain, (before, after), strict=True)
        ]
        apart = float(moved[1].mean() - moved[0].mean())
        return cls((follows * moved[0], follows * moved[1]), apart, spread)


def _standard_error(one: Floats, other: Floats, reading: _Reading | None) -> tuple[float, int]:
    """Of the difference, with its degrees of freedom; larger the further reading lay apart."""
    freedom = len(one) + len(other) - 2 - (reading is not None)
    if freedom < 1:  # one sample each tells no spread
        return 0.0, 0
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in (one, other))
    leverage = 1 / len(one) + 1 / len(other)
    if reading is not None:
        leverage += reading.apart**2 / reading.spread
    return math.sqrt(squares / freedom * leverage), freedom


def _p_value(one: Floats, other: Floats, middle: float, error: float, freedom: int) -> float | None:
    """Of a change in the direction of `middle`, by more than `ALIKE`."""
    if 2 / math.comb(len(one) + len(other), len(one)) > LEAST_P:
        return None
    direction, margin = math.copysign(1.0, middle), math.log1p(ALIKE)
    ranks = mannwhitneyu(direction * other - margin, direction * one, alternative="greater").pvalue
    beyond = abs(middle) - margin
    student = t.sf(beyond / error, freedom) if error else float(beyond <= 0)
    return min(1.0, 2 * max(float(ranks), float(student)))

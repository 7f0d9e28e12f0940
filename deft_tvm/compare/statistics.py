"""How much faster, and whether chance explains it: ratios of medians with intervals, and p values.

Rounds of one pass share their minute of a noisy machine, so they are not independent: intervals
come from a bootstrap that first draws passes, then rounds of each (two-stage cluster bootstrap;
Davison & Hinkley, *Bootstrap Methods and their Application*, section 3.8). p values are Mann and
Whitney's, corrected for the number of rows after Holm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from deft_tvm.timing import Summary

RESAMPLES = 2000
FEWEST = 6
"""Samples below which nothing is tested: with five of each the least p is 0.008, before Holm."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Times of one kernel, in any unit.

    Attributes:
        values: of each round.
        passes: rounds of each pass, in order.
    """

    values: Floats
    passes: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float], passes: Sequence[int] = ()) -> Samples:
        """Without passes, or where these do not fit, all rounds are one pass."""
        fits = sum(passes) == len(values) and all(passes)
        return cls(np.asarray(values, np.float64), tuple(passes) if fits else (len(values),))

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @cached_property
    def resampled(self) -> Floats:
        """float64[RESAMPLES], medians of so many other measurements as this might have been."""
        rng = np.random.default_rng(0)
        sizes = np.asarray(self.passes)
        starts = np.append(0, sizes.cumsum()[:-1])
        drawn = rng.integers(len(sizes), size=(RESAMPLES, len(sizes), 1))
        each = -(-len(self.values) // len(sizes))
        places = rng.random((RESAMPLES, len(sizes), each)) * sizes[drawn]
        rounds = starts[drawn] + places.astype(np.int64)
        return np.median(self.values[rounds].reshape(RESAMPLES, -1), axis=1)


def ratio(before: Samples, after: Samples) -> Summary:
    """Median after over median before: 1.1 is 10 % slower; with its 95 % interval."""
    return _interval(after.median / before.median, _ratios(before, after))


def mean_ratio(pairs: Sequence[tuple[Samples, Samples]]) -> Summary | None:
    """Geometric mean of the ratios of one pair or more, with its 95 % interval."""
    if not pairs:
        return None
    logs = [np.log(_ratios(*pair)) for pair in pairs]
    middle = np.mean([np.log(after.median / before.median) for before, after in pairs])
    # Each row was resampled by the same random numbers; rows are independent.
    rng = np.random.default_rng(1)
    shuffled = [rng.permutation(row) for row in logs]
    return _interval(float(np.exp(middle)), np.exp(np.mean(shuffled, axis=0)))


def p_value(before: Samples, after: Samples) -> float | None:
    """Two-sided, of Mann and Whitney's test; None with too few samples to say."""
    if min(len(before.values), len(after.values)) < FEWEST:
        return None
    return float(mannwhitneyu(before.values, after.values).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values as large as they are when all of these are looked at (Holm 1979)."""
    tested = sorted((p, place) for place, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = least
    return adjusted


def _ratios(before: Samples, after: Samples) -> Floats:
    """float64[RESAMPLES]; the two measurements are independent of each other."""
    order = np.random.default_rng(2).permutation(RESAMPLES)
    return after.resampled / before.resampled[order]


def _interval(middle: float, values: Floats) -> Summary:
    low, high = np.quantile(values, (0.025, 0.975))
    return Summary(middle, float(low), float(high))

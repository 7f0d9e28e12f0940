"""How much faster, and whether chance explains it: ratios of medians with intervals, and p values.

Rounds of one pass share their minute of a shared machine and the pages that their tensors lie in.
They are not independent, and passes are what counts: intervals are Welch's, of the logarithms of
the passes' medians. A measurement without passes has its rounds resampled. p values are Mann and
Whitney's over all rounds, corrected for the number of rows after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm, ttest_ind

from deft_tvm.timing import Summary

RESAMPLES = 2000
FEWEST = 6
"""Samples below which nothing is tested: with five of each the least p is 0.008, before Holm."""
FEWEST_PASSES = 3
"""Below so many their spread is not known."""

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
    def by_pass(self) -> Floats:
        """float64[passes], logarithms of the medians."""
        ends = np.cumsum(self.passes)[:-1]
        return np.log([np.median(part) for part in np.split(self.values, ends)])

    @cached_property
    def fastest(self) -> Floats:
        """float64[passes], logarithms of the fastest rounds."""
        ends = np.cumsum(self.passes)[:-1]
        return np.log([part.min() for part in np.split(self.values, ends)])

    @cached_property
    def resampled(self) -> Floats:
        """float64[RESAMPLES], medians of so many other measurements as this might have been."""
        rng = np.random.default_rng(len(self.values))
        return np.median(rng.choice(self.values, (RESAMPLES, len(self.values))), axis=1)


def ratio(before: Samples, after: Samples) -> Summary:
    """Median after over median before: 1.1 is 10 % slower; with its 95 % interval."""
    middle = after.median / before.median
    if min(len(before.passes), len(after.passes)) < FEWEST_PASSES:
        low, high = np.quantile(_ratios(before, after), (0.025, 0.975))
    else:
        low, high = _welch(before.by_pass, after.by_pass)
    return Summary(middle, min(float(low), middle), max(float(high), middle))


def fastest_ratio(before: Samples, after: Samples) -> Summary | None:
    """The same of each pass's fastest round; None where passes are too few to tell.

    Neighbours on a shared machine slow many rounds, and seldom every one of a pass.
    """
    if min(len(before.passes), len(after.passes)) < FEWEST_PASSES:
        return None
    middle = float(np.exp(np.median(after.fastest) - np.median(before.fastest)))
    low, high = _welch(before.fastest, after.fastest)
    return Summary(middle, min(low, middle), max(high, middle))


def mean_ratio(ratios: Sequence[Summary]) -> Summary | None:
    """Geometric mean of one ratio or more, with its 95 % interval as rows are independent."""
    if not ratios:
        return None
    half = norm.ppf(0.975)
    logs = [(math.log(r.median), math.log(r.high / r.low) / (2 * half)) for r in ratios]
    middle = sum(log for log, _ in logs) / len(logs)
    error = half * math.sqrt(sum(deviation**2 for _, deviation in logs)) / len(logs)
    return Summary(math.exp(middle), math.exp(middle - error), math.exp(middle + error))


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


def _welch(before: Floats, after: Floats) -> tuple[float, float]:
    """95 % interval of the ratio, from logarithms of each pass."""
    if np.ptp(before) == 0 and np.ptp(after) == 0:  # a spread of nothing has no test
        same = math.exp(after[0] - before[0])
        return same, same
    low, high = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    return math.exp(low), math.exp(high)


def _ratios(before: Samples, after: Samples) -> Floats:
    """float64[RESAMPLES]; the two measurements are independent of each other."""
    order = np.random.default_rng(2).permutation(RESAMPLES)
    return after.resampled / before.resampled[order]

"""Rows with verdicts, their mean, and whether a gate is passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from deft_tvm.compare.sources import Source, Subject, Surroundings, Tuned
from deft_tvm.compare.statistics import (
    ALIKE,
    LIMIT,
    Samples,
    change,
    common_unit,
    holm,
    mean_ratio,
    shared,
)
from deft_tvm.timing import SMALLEST, Summary

SURE = 0.05
"""Largest p, corrected for the number of rows, at which a change is believed."""


class Verdict(Enum):
    """Of one row; its value is what people read."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "~"
    FAILED = "failed"
    ONLY_BEFORE = "only in A"
    ONLY_AFTER = "only in B"


@dataclass(frozen=True)
class Row:
    """One subject in both logs.

    Attributes:
        subject: which.
        before, after: what the logs say of it; None where one has it not.
        ratio: time after over time before, with its interval, see `statistics.change`; None where
            either is missing. Across devices, the ratio of shares of the limit, by which neither is
            called faster.
        apart: the same with what most rows have in common taken away.
        p: the larger one of both, corrected for the number of rows; None where too little was
            measured to say.
        anchored: times were taken in parts of what was measured beside them in both.
        across_devices: the logs are of two devices.
    """

    subject: Subject
    before: Tuned | None
    after: Tuned | None
    ratio: Summary | None
    apart: Summary | None
    p: float | None
    anchored: bool
    across_devices: bool

    @property
    def sure(self) -> bool:
        """Neither chance nor a busy machine explains the ratio."""
        if self.across_devices or self.ratio is None or self.p is None:
            return False
        slower = all(ratio.low > 1 for ratio in self._ratios)
        return self.p < SURE and (slower or all(ratio.high < 1 for ratio in self._ratios))

    @property
    def _ratios(self) -> list[Summary]:
        """By each of which a changed row has changed."""
        return [found for found in (self.ratio, self.apart) if found is not None]

    @property
    def surely_slower_by(self) -> float:
        """By what part at the least; 0 where nothing is sure."""
        return max(0.0, min(r.median for r in self._ratios) - 1) if self.sure else 0.0

    @property
    def verdict(self) -> Verdict | None:
        """In one word; None across devices."""
        if self.before is None:
            return Verdict.ONLY_AFTER
        if self.after is None:
            return Verdict.ONLY_BEFORE
        if self.ratio is None:
            return Verdict.FAILED
        if self.across_devices:
            return None
        if self.sure and min(r.median for r in self._ratios) > 1 + SMALLEST:
            return Verdict.SLOWER
        if self.sure and max(r.median for r in self._ratios) < 1 / (1 + SMALLEST):
            return Verdict.FASTER
        return Verdict.SAME

    @property
    def decisions(self) -> dict[str, tuple[int | None, int | None]]:
        """Choices in which the two winners differ, before and after."""
        if not (self.before and self.after and self.before.best and self.after.best):
            return {}
        one, other = self.before.best.decision, self.after.best.decision
        names = dict.fromkeys((*one, *other))
        return {n: (one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)}


@dataclass(frozen=True)
class Comparison:
    """One log beside an earlier one.

    Attributes:
        before, after: the logs.
        rows: in the order of `before`, then what only `after` has.
        mean: geometric mean of the rows' ratios; None where nothing is in both.
        shared: a ratio that most rows have in common and that was taken away; 1 for nothing.
        differences: what differs in their surroundings, by name, before and after; only where both
            tell.
    """

    before: Source
    after: Source
    rows: tuple[Row, ...]
    mean: Summary | None
    shared: float
    differences: Mapping[str, tuple[str, str]]

    @property
    def surely_slower_by(self) -> float:
        """By what part at the least in the geometric mean; 0 where nothing is sure.

        By the rule for each row: only rows that were tested count, of which chance and `ALIKE` must
        not explain the mean, and not what most rows have in common either.
        """
        tested = (row._ratios for row in self.rows if row.p is not None)
        means = [mean for ratios in zip(*tested, strict=True) if (mean := mean_ratio(ratios))]
        if not means or any(mean.low <= 1 + ALIKE for mean in means):
            return 0.0
        return min(mean.median for mean in means) - 1

    @property
    def across_devices(self) -> bool:
        """Shares of two devices' limits are compared, and nothing is called faster."""
        return self.before.device != self.after.device

    def having(self, *verdicts: Verdict | None) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict in verdicts)

    @property
    def measured(self) -> tuple[Row, ...]:
        """Rows with a winner in both."""
        return tuple(row for row in self.rows if row.ratio is not None)


def compare(before: Source, after: Source) -> Comparison:
    """`after` beside `before`."""
    across = before.device != after.device
    subjects = dict.fromkeys((*before.tuned, *after.tuned))
    pairs = {s: (before.tuned.get(s), after.tuned.get(s)) for s in subjects}
    samples = {s: found for s, pair in pairs.items() if (found := _samples(*pair, across))}
    changes = {subject: change(*pair) for subject, pair in samples.items()}
    ratios = [each.ratio for each in changes.values()]
    common = 0.0 if across else shared(ratios, 1 + SMALLEST)
    apart = changes
    if common:
        apart = {subject: change(*pair, common) for subject, pair in samples.items()}
    tested = [
        None if across or not _tested(*pairs[s]) else _larger(changes[s].p, apart[s].p)
        for s in changes
    ]
    p_of = dict(zip(changes, holm(tested), strict=True))
    rows = tuple(
        Row(
            subject=subject,
            before=one,
            after=other,
            ratio=changes[subject].ratio if subject in changes else None,
            apart=apart[subject].ratio if subject in apart else None,
            p=p_of.get(subject),
            anchored=subject in samples and common_unit(*samples[subject]) is not None,
            across_devices=across,
        )
        for subject, (one, other) in pairs.items()
    )
    return Comparison(
        before,
        after,
        rows,
        mean_ratio(ratios),
        math.exp(common),
        _differences(before.surroundings, after.surroundings),
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _samples(
    before: Tuned | None, after: Tuned | None, across: bool
) -> tuple[Samples, Samples] | None:
    """What is compared of a subject; None where one log has no winner."""
    if before is None or after is None or before.best is None or after.best is None:
        return None
    one, other = before.samples, after.samples
    if across:  # times of two devices say nothing without their limits
        limits = before.limits, after.limits
        if limits[0] is None or limits[1] is None:
            return None
        return one.beside_only({LIMIT: limits[0]}), other.beside_only({LIMIT: limits[1]})
    if before.best.versions.get("torch") != after.best.versions.get("torch"):
        return one.beside_only({}), other.beside_only({})  # its product may take another time
    return one, other


def _tested(before: Tuned | None, after: Tuned | None) -> bool:
    """Not the best of a search, which looks better than it is."""
    return before is not None and after is not None and before.final and after.final


def _differences(before: Surroundings, after: Surroundings) -> dict[str, tuple[str, str]]:
    one, other = _flat(before), _flat(after)
    return {
        name: (one[name], other[name]) for name in one if one[name] != other.get(name, one[name])
    }


def _flat(found: Surroundings) -> dict[str, str]:
    fields = {
        "device": found.device,
        "name": found.name,
        "features": " ".join(found.features),
        "driver": found.driver,
        "measured": found.measured,
        "runner": found.runner,
        **dict(found.versions),
    }
    return {name: value for name, value in fields.items() if value}

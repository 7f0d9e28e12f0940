"""Two records of the same cells: which became faster or slower, beyond what noise explains.

Times of two days on a shared machine differ by what else ran. So a cell's time is taken as its
share of the limit, which was probed in the same rounds.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from deft_tvm.bench.record import Record
from deft_tvm.timing import Summary

SMALLEST = 0.05
"""A difference of the medians that is worth a word."""


class Verdict(Enum):
    """Of one cell: whether both intervals leave no doubt and the difference is worth a word."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "~"


class Change(msgspec.Struct, frozen=True):
    """One cell in two records, by its shares of the limit."""

    workload: str
    spec: str
    before: Summary
    after: Summary

    @property
    def ratio(self) -> float:
        """How many times faster it became, by the medians."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> Verdict:
        if self.after.high < self.before.low and self.ratio < 1 / (1 + SMALLEST):
            return Verdict.SLOWER
        if self.after.low > self.before.high and self.ratio > 1 + SMALLEST:
            return Verdict.FASTER
        return Verdict.SAME


def compare(before: Record, after: Record) -> list[Change]:
    """The cells that are in both, in the order of `after`."""
    earlier = before.by_cell
    return [
        Change(*cell, earlier[cell].share, measured.share)
        for cell, measured in after.by_cell.items()
        if cell in earlier
    ]

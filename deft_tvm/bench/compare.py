"""Two records of the same cells: which became faster or slower, beyond what noise explains.

Times of two days on a shared machine differ by what else ran. So a cell's time is taken as its
share of the limit, which was probed in the same rounds.

`deft_tvm.compare` has a stricter rule, which cannot be applied here: its samples are passes, in
processes of their own and some time apart, and it needs at least five and six. A record has the
rounds of one pass, one sample by that rule, which proves nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import msgspec

from deft_tvm.bench.record import Record
from deft_tvm.errors import InputError
from deft_tvm.timing import SMALLEST, Summary


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


def check_comparable(before: Record, device: str, cells: Collection[tuple[str, str]]) -> None:
    """Refuse what would compare nothing, before it is measured.

    Args:
        before: an earlier record.
        device: slug of what is measured.
        cells: workload and spec of each measurement.

    Raises:
        InputError: it is of another device, or has none of the cells.
    """
    if before.origin.device != device:
        raise InputError(
            f"the record to compare with is of {before.origin.device}; expected one of {device}, "
            "as shares of two devices' limits say nothing of a change"
        )
    if before.by_cell.keys().isdisjoint(cells):
        names = " or ".join(f"{workload} with {spec}" for workload, spec in [*cells][:2])
        raise InputError(
            f"the record to compare with has {len(before.by_cell)} other measurements; expected "
            f"some of the same, as of {names}"
        )


def compare(before: Record, after: Record) -> list[Change]:
    """The cells that are in both, in the order of `after`.

    Raises:
        InputError: as `check_comparable`.
    """
    check_comparable(before, after.origin.device, after.by_cell.keys())
    earlier = before.by_cell
    return [
        Change(*cell, earlier[cell].share, measured.share)
        for cell, measured in after.by_cell.items()
        if cell in earlier
    ]

"""What the kernels read beside q and KV: tiles of lanes and tokens, and which results are merged.

Rows are preorder rows here, of which each token is seen by an interval (`deft_tvm.tree.Forest`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import Int32, consecutive
from deft_tvm.tree import Forest

Ints = NDArray[np.integer[Any]]
MOST_ROWS = 0xFFFF
"""What half of an integer numbers."""


@dataclass(frozen=True)
class Tokens:
    """KV tokens in the order in which work reads them; one that is copied is there twice.

    Attributes:
        number: int64[T], of each in the caller's order, nodes back to back.
        low: int32[T], first row that sees it.
        high: int32[T], one past the last.
    """

    number: NDArray[np.int64]
    low: Int32
    high: Int32

    @classmethod
    def of_nodes(cls, forest: Forest, nodes: Ints) -> Tokens:
        """Of whole nodes, one after another."""
        lengths = forest.lengths[nodes]
        first = (forest.lengths.cumsum(dtype=np.int64) - forest.lengths)[nodes]
        within = consecutive(np.zeros_like(lengths), lengths)
        node = np.repeat(nodes, lengths)
        cut = np.maximum(within - forest.diagonal[node], 0)
        return cls(
            number=np.repeat(first, lengths) + within,
            low=(forest.row_begin[node] + cut).astype(np.int32),
            high=forest.row_end[node].astype(np.int32),
        )

    @property
    def sight(self) -> Int32:
        """int32[T], `low` in the lower half and `high` in the upper one: a kernel that loads one
        number a token in place of two fits twice on a multiprocessor."""
        packed = self.low.astype(np.uint32) | self.high.astype(np.uint32) << np.uint32(16)
        return packed.view(np.int32)

    def rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """The rows that see any of tokens [begin, end)."""
        low, high = self.low[begin:end], self.high[begin:end]
        if begin == end:
            return np.empty(0, np.int64)
        first, last = int(low.min()), int(high.max())
        change = np.bincount(low - first, minlength=last - first + 1)
        change -= np.bincount(high - first, minlength=last - first + 1)
        return first + np.flatnonzero(change.cumsum() > 0)

    def hull(self, begin: int, end: int, first: int, last: int) -> tuple[int, int]:
        """Of tokens [begin, end) the part outside of which rows `first` to `last` see nothing."""
        seen = (self.low[begin:end] <= last) & (self.high[begin:end] > first)
        return begin + int(seen.argmax()), end - int(seen[::-1].argmax())


class Work(NamedTuple):
    """Tokens [begin, end) and rows that see some of them, to be tiled by `lanes` lanes."""

    begin: int
    end: int
    rows: NDArray[np.int64]
    lanes: int


class Tile(NamedTuple):
    """Tokens [begin, end) and the lanes [first_lane, end_lane) that read them.

    Lane ``e * group + h`` is head ``h`` of each group in entry ``e`` of the plan.
    """

    begin: int
    end: int
    first_lane: int
    end_lane: int


@dataclass(frozen=True)
class Plan:
    """Work for both stages; an entry is a row in one piece of work.

    Attributes:
        tokens: what the tiles index.
        tiles: for each size of tiles, in lanes, int32[tiles, 4] with the fields of `Tile`, those
            of many tokens first.
        entry_row: int32[E], preorder row of each entry.
        entry_source: int32[E], the caller's number of it.
        entry_place: int32[E], its partial result; -1 for the only entry of a row, whose result is
            the row's.
        merged: int32[M, 3], for each row of not one entry the caller's number, and the begin and
            end of its partial results.
        num_partials: of all rows.
        masked: some row of some tile does not see all of the tile's tokens.
    """

    tokens: Tokens
    tiles: dict[int, Int32]
    entry_row: Int32
    entry_source: Int32
    entry_place: Int32
    merged: Int32
    num_partials: int
    masked: bool

    @classmethod
    def of(cls, forest: Forest, tokens: Tokens, works: Iterable[Work], group: int) -> Plan:
        """Tiles for all of `works`; each row must find each of its tokens in one of them."""
        entries, tiles, masked, count = [], dict[int, list[Tile]](), False, 0
        for work in works:
            for tile in _tiles(work, tokens, group):
                moved = count * group
                tiles.setdefault(work.lanes, []).append(
                    tile._replace(
                        first_lane=tile.first_lane + moved, end_lane=tile.end_lane + moved
                    )
                )
            seen = slice(work.begin, work.end)
            most, least = tokens.low[seen].max(), tokens.high[seen].min()
            masked = masked or bool(most > work.rows.min() or least <= work.rows.max())
            entries.append(work.rows)
            count += len(work.rows)
        row = np.concatenate([np.empty(0, np.int64), *entries])
        times = np.bincount(row, minlength=forest.num_rows)
        parted = np.where(times == 1, 0, times)
        ends = parted.cumsum()
        # Entries sorted by row: those of one row take neighbouring places.
        order = row.argsort(kind="stable")
        order = order[times[row[order]] > 1]
        place = np.full(len(row), -1, np.int32)
        place[order] = np.arange(len(order))
        several = np.flatnonzero(times != 1)
        merged = np.stack(
            [forest.row_order[several], (ends - parted)[several], ends[several]], axis=1
        )
        return cls(
            tokens=tokens,
            tiles={lanes: _heaviest_first(found) for lanes, found in tiles.items()},
            entry_row=row.astype(np.int32),
            entry_source=forest.row_order[row].astype(np.int32),
            entry_place=place,
            merged=merged.astype(np.int32),
            num_partials=len(order),
            masked=masked,
        )


def _tiles(work: Work, tokens: Tokens, group: int) -> Iterator[Tile]:
    """Even tiles of the work's lanes, each with what its rows see."""
    lanes = len(work.rows) * group
    for first in range(0, lanes, work.lanes):
        end = min(first + work.lanes, lanes)
        rows = work.rows[first // group], work.rows[(end - 1) // group]
        yield Tile(*tokens.hull(work.begin, work.end, *rows), first, end)


def _heaviest_first(tiles: list[Tile]) -> Int32:
    """Tiles of the same length stay neighbours, as they may read the same KV."""
    array = np.array(tiles, np.int32)
    return array[np.argsort(array[:, 0] - array[:, 1], kind="stable")]

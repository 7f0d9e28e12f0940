"""The plan: the int32 arrays that the kernels read, laid out from groups.

Stage 1 runs work items. An item reads its runs of KV one after another for its rows, and writes
for each row a partial, or the final output where the row is in no other item. Stage 2 walks for
each row the list of its partials, which lie side by side. ::

    items ── run_begin, run_end ──▶ runs ── page_begin ──▶ page_indices ──▶ KV cache
      └───── dest_begin ──▶ dests ──▶ partial slots ◀── merge_indptr ── merge_rows (stage 2)

The order of a row's partials follows the tree and not the cost, so that costs never change the
order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import offsets
from deft_tvm.errors import PlanError
from deft_tvm.plan.columns import COLUMNS, HEADER, Item, Run
from deft_tvm.plan.cost import Floats, Ints
from deft_tvm.plan.split import Groups, Walk, interval_minima
from deft_tvm.spec import TileShape

if TYPE_CHECKING:
    from deft_tvm.pages import PageTable
    from deft_tvm.plan.buffer import PlanBuffer
    from deft_tvm.plan.planner import Recipe
    from deft_tvm.tree import Forest

Int32 = NDArray[np.int32]
Launches = tuple[tuple[int, int, int], ...]


class Laid(NamedTuple):
    """What a plan's groups came to: attributes of `Plan` with the same names."""

    grouping: str
    header: Int32
    row_positions: Int32
    runs: Int32
    items: Int32
    launches: Launches
    dests: Int32
    merge_rows: Int32
    merge_indptr: Int32
    groups: Groups


def _array(name: str) -> Any:
    return property(lambda plan: getattr(plan.arrays, name))


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """One step's work, for every layer and every spec with the same group and page size.

    All arrays are int32 and C-contiguous. Rows are preorder rows unless called the caller's.

    Attributes:
        header: [8] ``page_shift``, ``search_steps`` (of the binary search for a token's run), 0 …
        row_order: [R], the caller's number of each row.
        row_positions: [R], path position of each row; [0] where there is no window.
        runs: [U, 7] ``offset`` (tokens of the item before the run), ``page_begin``,
            ``first_slot``, ``row_begin``, ``row_end``, ``diagonal``, ``position``. Token t of a run
            has path position ``position + t``, lies in slot
            ``x % page_size`` of page ``page_indices[page_begin + x // page_size]``, with
            ``x = first_slot + t``, and is seen by the rows
            ``[row_begin + max(0, t - diagonal), row_end)``, those of other items included, whose
            positions are less than `window` above its own.
        items: [I, 7] ``row_begin``, ``num_rows``, ``run_begin``, ``run_end``, ``num_tokens``,
            ``dest_begin``, ``last_position`` (the highest of its rows; 0 without a window); by
            tile class, dearest first.
        launches: ``(tile, item_begin, item_end)`` of each tile class that has items.
        dests: [D], entry ``dest_begin + i`` for row ``row_begin + i`` of an item: a partial slot,
            or ``~caller's row`` where the item is the row's only one.
        merge_rows: [Mr], the caller's rows with no item, or with two or more.
        merge_indptr: [Mr + 1], the partial slots of each; none: output 0 and LSE -inf.
        page_indices: [P], as the page table has them.
        tiles: the tile classes that `launches` counts in.
        granules: of each tile class the lane rows that its kernel computes at a time.
        window: positions that a row sees, its own included; None for all.
        group: query heads a KV head, by which `tiles` were taken to hold so many rows.
        grouping: how the forest was divided; never ``auto``.
        max_page: the highest page that the page table names.
        groups: the items before they were ordered, in `Walk` places, for `update`.
        laid: the arrays, or what they are cut out of when they are asked for.
        forest: what was planned.
        pages: where its tokens lie.
        recipe: what was asked for, with the grouping that came of it.
    """

    laid: Laid | PlanBuffer
    forest: Forest
    pages: PageTable
    recipe: Recipe

    @property
    def arrays(self) -> Laid:
        return self.laid if isinstance(self.laid, Laid) else self.laid.cut

    header, runs, items, launches = map(_array, ("header", "runs", "items", "launches"))
    dests, merge_rows, merge_indptr = map(_array, ("dests", "merge_rows", "merge_indptr"))
    groups, row_positions = map(_array, ("groups", "row_positions"))

    @property
    def grouping(self) -> str:
        return self.laid.grouping

    @property
    def page_indices(self) -> Int32:
        return self.pages.page_indices

    @property
    def max_page(self) -> int:
        return self.pages.max_page

    @property
    def tiles(self) -> tuple[TileShape, ...]:
        return self.recipe.tiles

    @property
    def granules(self) -> tuple[int, ...]:
        return self.recipe.prices.granules

    @property
    def group(self) -> int:
        return self.recipe.group

    @property
    def window(self) -> int | None:
        return self.recipe.window

    @property
    def row_order(self) -> Int32:
        return self.forest.row_order

    @property
    def num_rows(self) -> int:
        return self.forest.num_rows

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_partials(self) -> int:
        """Partial slots that the workspace must hold."""
        return int(self.merge_indptr[-1])

    @property
    def page_size(self) -> int:
        """Tokens a page; 2^30 where the cache is not paged."""
        return 1 << int(self.header[0])

    def update(self, forest: Forest, pages: PageTable) -> Plan:
        """The plan after KV was added or moved: the same tree and rows, other lengths or pages.

        The plan is equal to one made afresh with this plan's grouping, which is not chosen again.
        The planner in Python keeps what stays: with equal lengths all but the pages, and while
        every item keeps its rows the numbers of the partials.

        Raises:
            PlanError: `forest` has other parents or rows.
            PageError: `pages` does not hold the tokens of `forest`.
        """
        if not self.forest.same_topology(forest):
            raise PlanError(
                f"forest is {forest}, whose parents or rows are not those of the plan's; "
                f"expected other lengths or pages alone, else a new plan"
            )
        laid = isinstance(self.laid, Laid)
        alike = laid and pages.page_size == self.page_size
        if alike and np.array_equal(self.forest.lengths, forest.lengths):
            return self._moved(forest, pages)
        return self.recipe(forest, pages, self)

    def _moved(self, forest: Forest, pages: PageTable) -> Plan:
        pages.check(forest)
        runs = self.runs.copy()
        locate(runs, forest.preorder[self.groups.node], self.groups.begin, pages)
        return replace(
            self,
            laid=self.arrays._replace(header=lay_out_header(self.groups, pages), runs=runs),
            forest=forest,
            pages=pages,
        )

    def __repr__(self) -> str:
        classes = ", ".join(
            f"{end - begin} {self.tiles[i].name}" for i, begin, end in self.launches
        )
        return (
            f"Plan({self.grouping}: {self.num_items} items ({classes}), {len(self.runs)} runs, "
            f"{self.num_rows} rows, {self.num_partials} partials)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Partials:
    """Where each row of each item goes: three arrays of `Plan`."""

    dests: Int32
    merge_rows: Int32
    merge_indptr: Int32


def number_partials(groups: Groups, row_order: Int32) -> Partials:
    """Number the partials row by row, those of one row by the order of `groups`.

    A row of a single item gets none: it goes straight to the output.
    """
    rows = groups.rows
    shift = (groups.row_begin - (rows.cumsum() - rows)).astype(np.int32)
    row = shift.repeat(rows)
    row += np.arange(len(row), dtype=np.int32)
    counts = np.bincount(row, minlength=len(row_order))
    once = counts == 1
    if once.all():
        return Partials(~row_order[row], row_order[:0], np.zeros(1, np.int32))
    alone, merged = once.nonzero()[0], (~once).nonzero()[0]
    # Entry by entry in order of rows: a slot for each, but for rows that have one entry only.
    skipped = once.cumsum(dtype=np.int32)
    by_row = np.arange(len(row), dtype=np.int32)
    by_row -= skipped.repeat(counts)
    by_row[counts.cumsum()[alone] - 1] = ~row_order[alone]
    dests = np.empty(len(row), np.int32)
    # Sixteen bits are sorted by radix, several times as fast.
    dests[row.astype(np.min_scalar_type(len(row_order))).argsort(kind="stable")] = by_row
    indptr = offsets(counts[merged]).astype(np.int32)
    return Partials(dests, row_order[merged], indptr)


def lay_out_runs(walk: Walk, groups: Groups, pages: PageTable) -> Int32:
    """int32[U, 7], a run for each piece: see `Plan.runs`."""
    node, begin = groups.node, groups.begin + walk.skip[groups.node]
    common = walk.diagonal[node] - groups.begin
    seen_by_all = np.maximum(0, common)
    runs = np.empty((len(node), COLUMNS), np.int32)
    runs[:, Run.OFFSET] = groups.first
    runs[:, Run.ROW_BEGIN] = walk.row_begin[node] + (seen_by_all - common)
    runs[:, Run.ROW_END] = walk.row_end[node]
    runs[:, Run.DIAGONAL] = seen_by_all
    runs[:, Run.POSITION] = walk.start[node] + begin
    locate(runs, walk.node[node], begin, pages)
    return runs


def locate(runs: Int32, node: Ints, begin: Ints, pages: PageTable) -> None:
    """Write `page_begin` and `first_slot` of runs that begin at token `begin` of `node`."""
    slot = pages.first_slot[node] + begin
    runs[:, Run.PAGE_BEGIN] = pages.page_indptr[node] + (slot >> pages.page_shift)
    runs[:, Run.FIRST_SLOT] = slot & ((1 << pages.page_shift) - 1)


def lay_out_items(
    walk: Walk, groups: Groups, tile: Ints, cost: Floats, num_tiles: int
) -> tuple[Int32, Launches]:
    """int32[I, 7] and the launches: see `Plan.items`."""
    rows = groups.rows
    items = np.zeros((len(rows), COLUMNS), np.int32)
    items[:, Item.ROW_BEGIN] = groups.row_begin
    items[:, Item.NUM_ROWS] = rows
    items[:, Item.RUN_BEGIN] = groups.indptr[:-1]
    items[:, Item.RUN_END] = groups.indptr[1:]
    items[:, Item.NUM_TOKENS] = groups.tokens
    items[:, Item.DEST_BEGIN] = rows.cumsum() - rows
    if walk.window is not None:
        last = -interval_minima(-walk.positions, groups.row_begin, groups.row_end)
        items[:, Item.LAST_POSITION] = last
    ends = np.bincount(tile, minlength=num_tiles).cumsum().tolist()
    spans = zip(range(num_tiles), [0, *ends], ends, strict=False)
    launches = tuple((index, begin, end) for index, begin, end in spans if end > begin)
    return items[np.lexsort((-cost, tile))], launches


def lay_out_header(groups: Groups, pages: PageTable) -> Int32:
    """int32[8]: see `Plan.header`."""
    most_runs = int(groups.pieces.max(initial=1))
    header = np.zeros(HEADER, np.int32)
    header[:2] = pages.page_shift, (most_runs - 1).bit_length()
    return header

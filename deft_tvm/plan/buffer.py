"""A plan's arrays in one buffer: as the compiled planner writes them, and kernels get them.

The *layout* says how it is divided: whether there are pages, the pages (or tokens) that a
cache must have, the partial slots; the lengths of page_indices, row_order, row_positions, runs,
dests and merge_rows; the items of each tile class. `deft_tvm/native/plan_buffer.h` has the same
order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.pages import CONTIGUOUS_SIZE
from deft_tvm.plan.columns import COLUMNS, HEADER
from deft_tvm.plan.layout import Laid
from deft_tvm.plan.split import Groups

if TYPE_CHECKING:
    from deft_tvm.plan.layout import Plan

INT32, INT64 = "i", "q"
"""Type codes of Python's arrays."""

SCALARS = 3
FIXED = SCALARS + 6
"""Numbers of a layout before those of the tile classes."""


def part_sizes(layout: Sequence[int]) -> list[int]:
    """Elements of each part, in order: header, the six arrays, merge_indptr, items."""
    pages, rows, positions, runs, dests, merged, *items = layout[SCALARS:]
    sizes = [HEADER, pages, rows, positions, runs * COLUMNS, dests, merged, merged + 1]
    return [*sizes, sum(items) * COLUMNS]


def in_one_buffer(plan: Plan) -> tuple[array[int], int, array[int]]:
    """`whole`, `size` and `layout` of a `PlanBuffer` that has all that kernels read of `plan`."""
    laid = plan.laid
    if isinstance(laid, PlanBuffer):
        return laid.whole, laid.size, laid.layout
    rows = (plan.row_order, plan.row_positions)
    arrays = (plan.page_indices, *rows, plan.runs, plan.dests, plan.merge_rows)
    parts = (plan.header, *arrays, plan.merge_indptr, plan.items)
    counts = {tile: end - begin for tile, begin, end in plan.launches}
    paged = plan.page_size < CONTIGUOUS_SIZE
    needed = plan.max_page + 1 if paged else plan.forest.num_tokens
    layout = [int(paged), needed, plan.num_partials, *map(len, arrays)]
    layout += [counts.get(tile, 0) for tile in range(len(plan.tiles))]
    whole = array(INT32, np.concatenate([part.reshape(-1) for part in parts]).tobytes())
    return whole, len(whole), array(INT64, layout)


class PlanBuffer:
    """What the compiled planner wrote, with the groups behind what kernels read. Arrays are cut
    out when they are asked for, which decoding never does.

    Attributes:
        whole: all that was written, 32 bits an element.
        size: how much of it is what kernels read.
        layout: see above, 64 bits an element.
        grouping: as in `Plan`.
    """

    def __init__(self, whole: array[int], size: int, layout: array[int], grouping: str) -> None:
        self.whole = whole
        self.size = size
        self.layout = layout
        self.grouping = grouping

    @cached_property
    def cut(self) -> Laid:
        """The arrays, as views."""
        layout, whole = self.layout.tolist(), np.frombuffer(self.whole, np.int32)
        items_of, runs = layout[FIXED:], layout[SCALARS + 3]
        items = sum(items_of)
        of_groups = (runs, runs, runs, items + 1, items, items)
        ends = accumulate((*part_sizes(layout), *of_groups), initial=0)
        parts = [whole[begin:end] for begin, end in pairwise(ends)]
        bounds = pairwise(accumulate(items_of, initial=0))
        return Laid(
            grouping=self.grouping,
            header=parts[0],
            row_positions=parts[3],
            runs=parts[4].reshape(-1, COLUMNS),
            items=parts[8].reshape(-1, COLUMNS),
            launches=tuple((tile, *bound) for tile, bound in enumerate(bounds) if items_of[tile]),
            dests=parts[5],
            merge_rows=parts[6],
            merge_indptr=parts[7],
            groups=Groups(*parts[9:]),
        )

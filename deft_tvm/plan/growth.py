"""A plan that follows its nodes while they grow: the items stay, and only lengths are written.

Every step of decoding adds a few tokens, and hardly ever does that change which items are cheapest.
So the items that were chosen for some lengths are kept until the tokens have grown by `KEPT` since,
and a step costs a few array operations. Ends of pieces move with their node's end, and with them
the tokens of items, the diagonals and the positions; rows, partials and pages stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.arrays import offsets
from deft_tvm.plan.frame import Frame
from deft_tvm.plan.layout import Plan, locate
from deft_tvm.plan.split import Groups

if TYPE_CHECKING:
    from deft_tvm.pages import PageTable
    from deft_tvm.tree import Forest

KEPT = 1 / 16
"""Growth up to which items are kept, in parts of the tokens for which they were chosen: what they
then cost is off by about as much at the most."""


def frame_of(plan: Plan) -> Frame | None:
    """The frame of a plan as it was chosen; None if rows of items would change with growth.

    They do where a piece begins among the last tokens of a node, which not all rows see.
    """
    forest, groups = plan.forest, plan.groups
    node = forest.preorder[groups.node]
    common = forest.diagonal[node]
    if (groups.begin > common).any():
        return None
    return Frame(
        lengths=forest.lengths,
        most=int(forest.num_tokens * (1 + KEPT)),
        filled=int(np.count_nonzero(forest.lengths)),
        node=node,
        head=groups.indptr[:-1][groups.owner],
        moves=(groups.end > common) | (groups.end == forest.lengths[node]),
    )


def follow(plan: Plan, frame: Frame, forest: Forest, pages: PageTable) -> Plan:
    """`plan`, which has this `frame`, with the lengths and starts of `forest`, and its pages."""
    grown = (forest.lengths - plan.forest.lengths)[frame.node]
    old = plan.groups
    end = old.end + grown * frame.moves
    groups = Groups(old.node, old.begin, end, old.indptr, old.row_begin, old.row_end)
    before = offsets(end - old.begin)
    runs, items = plan.runs.copy(), plan.items.copy()
    runs[:, 0] = before[:-1] - before[frame.head]
    runs[:, 5] += grown
    runs[:, 6] = forest.start[frame.node] + old.begin
    items[:, 4] = before[items[:, 3]] - before[items[:, 2]]
    if pages.page_indices is not plan.page_indices:
        locate(runs, frame.node, old.begin, pages)
    changed = {
        "laid": plan.arrays._replace(runs=runs, items=items, groups=groups),
        "page_indices": pages.page_indices,
        "max_page": pages.max_page,
        "forest": forest,
        "frame": frame,
    }
    return Plan(**vars(plan) | changed)

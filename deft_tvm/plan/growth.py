"""A plan that follows its nodes while they grow: the items stay, and only lengths are written.

Every step of decoding adds a few tokens, and hardly ever does that change which items are cheapest.
So the items that were chosen for some lengths are kept until the tokens have grown by `KEPT` since,
and a step costs a few array operations. Ends of pieces move with their node's end, and with them
the tokens of items, the diagonals and the positions; rows, partials and pages stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.arrays import offsets
from deft_tvm.plan.clusters import Bools
from deft_tvm.plan.cost import Ints
from deft_tvm.plan.layout import Int32, Plan, locate
from deft_tvm.plan.split import Groups

if TYPE_CHECKING:
    from deft_tvm.pages import PageTable
    from deft_tvm.tree import Forest

KEPT = 1 / 16
"""Growth up to which items are kept, in parts of the tokens for which they were chosen: what they
then cost is off by about as much at the most."""


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """What stays of a plan, and how the rest follows its nodes.

    Attributes:
        lengths: int32[nodes], those for which the items were chosen.
        most: tokens of all nodes up to which they are kept.
        filled: nodes that have any tokens; another one would need an item.
        node: int[P], the caller's number of the node of each piece.
        head: int[P], the first piece of the group of each piece.
        moves: bool[P], whose end moves with the end of the node.
    """

    lengths: Int32
    most: int
    filled: int
    node: Ints
    head: Ints
    moves: Bools

    @classmethod
    def of(cls, plan: Plan) -> Frame | None:
        """The frame of a plan as it was chosen; None if rows of items would change with growth.

        They do where a piece begins among the last tokens of a node, which not all rows see.
        """
        forest, groups = plan.forest, plan.groups
        node = forest.preorder[groups.node]
        common = forest.diagonal[node]
        if (groups.begin > common).any():
            return None
        return cls(
            lengths=forest.lengths,
            most=int(forest.num_tokens * (1 + KEPT)),
            filled=int(np.count_nonzero(forest.lengths)),
            node=node,
            head=groups.indptr[:-1][groups.owner],
            moves=(groups.end > common) | (groups.end == forest.lengths[node]),
        )

    def holds(self, forest: Forest) -> bool:
        """Whether the nodes have but grown, and little enough."""
        return (
            forest.num_tokens <= self.most
            and np.count_nonzero(forest.lengths) == self.filled
            and not (forest.lengths < self.lengths).any()
        )

    def follow(self, plan: Plan, forest: Forest, pages: PageTable) -> Plan:
        """`plan`, which has this frame, with the lengths and starts of `forest`, and its pages."""
        grown = (forest.lengths - plan.forest.lengths)[self.node]
        old = plan.groups
        end = old.end + grown * self.moves
        groups = Groups(old.node, old.begin, end, old.indptr, old.row_begin, old.row_end)
        before = offsets(end - old.begin)
        runs, items = plan.runs.copy(), plan.items.copy()
        runs[:, 0] = before[:-1] - before[self.head]
        runs[:, 5] += grown
        runs[:, 6] = forest.start[self.node] + old.begin
        items[:, 4] = before[items[:, 3]] - before[items[:, 2]]
        if pages.page_indices is not plan.page_indices:
            locate(runs, self.node, old.begin, pages)
        changed = {
            "runs": runs,
            "items": items,
            "page_indices": pages.page_indices,
            "max_page": pages.max_page,
            "forest": forest,
            "groups": groups,
            "frame": self,
        }
        return Plan(**vars(plan) | changed)

"""What stays of a plan while its nodes grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.plan.clusters import Bools
from deft_tvm.plan.cost import Ints

if TYPE_CHECKING:
    from deft_tvm.tree import Forest


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """Items that were chosen for some lengths, and how they follow their nodes.

    Attributes:
        lengths: int32[nodes], those for which the items were chosen.
        most: tokens of all nodes up to which they are kept.
        filled: nodes that have any tokens; another one would need an item.
        node: int[P], the caller's number of the node of each piece.
        head: int[P], the first piece of the group of each piece.
        moves: bool[P], whose end moves with the end of the node.
    """

    lengths: Ints
    most: int
    filled: int
    node: Ints
    head: Ints
    moves: Bools

    def holds(self, forest: Forest) -> bool:
        """Whether the nodes have but grown, and little enough."""
        return (
            forest.num_tokens <= self.most
            and np.count_nonzero(forest.lengths) == self.filled
            and not (forest.lengths < self.lengths).any()
        )

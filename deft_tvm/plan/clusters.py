"""A forest contracted where small: each subtree best taken as one item becomes one cluster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import offsets
from deft_tvm.plan.cost import Floats, Ints, Prices
from deft_tvm.plan.split import Walk

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Clusters:
    """A tree of contracted subtrees and single nodes, depth first; one array entry a cluster.

    Attributes:
        walk: the nodes.
        begin: place of the first node in the walk.
        taken: whether it is a subtree taken as one, and not a single node.
        reads: tokens of each node's subtree, int[nodes].
        alone: price of each node as an item of its own, float[nodes]; see `Prices.cost`.
        whole: price of each node's subtree as one.
        parent: the cluster above, -1 for none.
        balanced: seconds in which the whole plan could end.
    """

    walk: Walk
    begin: Ints
    taken: Bools
    reads: Ints
    alone: Floats
    whole: Floats
    parent: Ints
    balanced: float

    def __len__(self) -> int:
        return len(self.begin)

    @cached_property
    def end(self) -> Ints:
        """One past the place of the last node."""
        return np.where(self.taken, self.walk.subtree_end[self.begin], self.begin + 1)

    @cached_property
    def row_begin(self) -> Ints:
        """First row of the subtree."""
        return self.walk.row_begin[self.begin]

    @cached_property
    def row_end(self) -> Ints:
        """One past the last."""
        return self.walk.row_end[self.begin]

    @cached_property
    def rows(self) -> Ints:
        return self.row_end - self.row_begin

    @cached_property
    def own_rows(self) -> Ints:
        """Rows in no cluster below."""
        return np.where(self.taken, self.rows, self.walk.own_rows[self.begin])

    @cached_property
    def tokens(self) -> Ints:
        """KV tokens."""
        return np.where(self.taken, self.reads[self.begin], self.walk.length[self.begin])

    @cached_property
    def cost(self) -> Floats:
        """Price as an item of its own."""
        return np.where(self.taken, self.whole[self.begin], self.alone[self.begin])


def contract(walk: Walk, prices: Prices) -> Clusters:
    """Contract the largest subtrees in which every node is best taken together with its children.

    A subtree is taken as one if that costs no more than its node and its children's subtrees,
    taken as one each, apart; and if the same holds everywhere below.
    """
    rows = walk.row_end - walk.row_begin
    tokens = _subtree_sums(walk, walk.length)
    reads = _tokens_a_block(walk, tokens, prices.most_rows)
    both = np.concatenate((walk.length, reads)), np.concatenate((rows, rows))
    cost, balanced = prices.cost(*both, planned=len(rows))
    alone, whole = cost[: len(rows)], cost[len(rows) :]
    inner = walk.parent >= 0
    below = np.bincount(walk.parent + 1, weights=whole, minlength=len(rows) + 1)[1:]
    # Apart, each row below has a partial here and one further down; at a root neither was needed.
    partials = (rows - walk.own_rows) * (walk.length > 0) * (2 - inner)
    worse = whole > alone + partials * prices.partial_seconds + below
    clean = _subtree_sums(walk, worse) == 0
    heads = ~(clean & inner & clean[walk.parent])
    first = heads.nonzero()[0]
    return Clusters(
        walk=walk,
        begin=first,
        taken=clean[first],
        reads=tokens,
        alone=alone,
        whole=whole,
        parent=offsets(heads)[walk.parent[first] + 1] - 1,
        balanced=balanced,
    )


def _subtree_sums(walk: Walk, values: Ints | Bools) -> Ints:
    """The sum of `values` over each node's subtree, itself included."""
    total = offsets(values)
    return total[walk.subtree_end] - total[:-1]


def _tokens_a_block(walk: Walk, tokens: Ints, most: int) -> Ints:
    """Tokens of each subtree that a block of `most` of its rows reads, on average.

    A block reads only what its rows see, so this is less than all where there are many rows.
    """
    rows = walk.row_end - walk.row_begin
    if not (rows > most).any():
        return tokens
    blocks = (walk.row_end - 1) // most - walk.row_begin.astype(np.int64) // most + 1
    reads = _subtree_sums(walk, walk.length * blocks)
    return np.minimum(tokens, reads // np.maximum(1, -(-rows // most)))

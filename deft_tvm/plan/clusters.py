"""A forest contracted where small: each subtree best taken as one item becomes one cluster."""

from __future__ import annotations

from dataclasses import dataclass

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
        begin: place of the first node in the walk.
        end: one past the place of the last node.
        parent: the cluster above, -1 for none.
        tokens: KV tokens.
        row_begin: first row of the subtree.
        row_end: one past the last.
        own_rows: rows in no cluster below.
        cost: price as an item of its own, see `Prices.cost`.
        balanced: seconds in which the whole plan could end.
    """

    begin: Ints
    end: Ints
    parent: Ints
    tokens: Ints
    row_begin: Ints
    row_end: Ints
    own_rows: Ints
    cost: Floats
    balanced: float

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def rows(self) -> Ints:
        return self.row_end - self.row_begin


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
    taken = clean[first]
    return Clusters(
        begin=first,
        end=np.where(taken, walk.subtree_end[first], first + 1),
        parent=offsets(heads)[walk.parent[first] + 1] - 1,
        tokens=np.where(taken, tokens[first], walk.length[first]),
        row_begin=walk.row_begin[first],
        row_end=walk.row_end[first],
        own_rows=np.where(taken, rows[first], walk.own_rows[first]),
        cost=np.where(taken, whole[first], alone[first]),
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

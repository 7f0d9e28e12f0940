"""The grouping by cost: what is small is packed into one item, what is short is read again.

Starting from a group for each node, three steps each lower the modelled time:

1. `contract`: a whole subtree becomes one group with interval masks, where masked work costs less
   than the many items and their partials (a draft tree of 64 nodes is one item).
2. `hand_down`: a child reads its parent's KV within its own group, where that is cheaper than the
   partials and the share of the parent's item that it saves. This is PAT's edge rule (ASPLOS 2026:
   merge a child of s rows into a parent of l tokens iff 4·s > l) with the prices of the device
   in place of its constant; FastTree (MLSys 2025) decides its edges likewise.
3. `merge_neighbours`: groups that follow each other depth first share an item where padding lanes
   and steps makes that cheaper, if they are of one tree.

Nothing loops over nodes: subtrees are ranges of the depth-first walk and their sums differences of
running totals; chains climb by powers of two; neighbours merge in pairs, in a logarithm of rounds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deft_tvm.plan.clusters import Bools, contract
from deft_tvm.plan.cost import Ints, Prices
from deft_tvm.plan.joins import by_cluster, hand_down
from deft_tvm.plan.split import Groups, Walk

MERGE_GAIN = 0.02
"""Neighbours merge if that saves this part of their time: less is not worth the masked work
(chosen, not measured)."""


def packed(walk: Walk, prices: Prices) -> Groups:
    """Groups of the forest in which neither packing nor re-reading any more would pay."""
    clusters = contract(walk, prices)
    groups, mergeable = by_cluster(clusters, hand_down(clusters, prices))
    if len(groups) < 2:
        return groups
    tree = (walk.parent < 0).cumsum()[groups.node[groups.indptr[:-1]]]
    if not (mergeable[:-1] & mergeable[1:] & (tree[:-1] == tree[1:])).any():
        return groups
    return merge_neighbours(groups, tree, mergeable, prices, clusters.balanced)


def merge_neighbours(
    groups: Groups, tree: Ints, mergeable: Bools, prices: Prices, balanced: float
) -> Groups:
    """Merge groups that follow each other while that is cheaper, in rounds of disjoint pairs.

    Args:
        groups: in depth-first order.
        tree: int[G], the number of each group's tree. Trees never share an item: a NaN in the KV
            of one request would reach the rows of another, since 0 · NaN is NaN.
        mergeable: bool[G], which hold a stretch of the walk with all rows that see it.
        prices: the device.
        balanced: seconds in which the whole plan could end.
    """
    begin, end, tokens = groups.row_begin, groups.row_end, groups.tokens
    start = np.arange(len(groups))
    cost = prices.cost(tokens, end - begin, balanced)[0]
    while len(start) > 1:
        low, high = np.minimum(begin[:-1], begin[1:]), np.maximum(end[:-1], end[1:])
        merged = prices.cost(tokens[:-1] + tokens[1:], high - low, balanced)[0]
        apart = cost[:-1] + cost[1:]
        # Neighbours in depth-first order touch or overlap, so these rows have a partial in both.
        twice = (end - begin)[:-1] + (end - begin)[1:] - (high - low)
        gain = apart + twice * prices.partial_seconds - merged
        allowed = mergeable[:-1] & mergeable[1:] & (tree[:-1] == tree[1:])
        pairs = _disjoint((gain > MERGE_GAIN * apart) & allowed)
        if not len(pairs):
            break
        cost[pairs] = merged[pairs]
        first = np.delete(np.arange(len(start)), pairs + 1)
        start, mergeable, cost = start[first], mergeable[first], cost[first]
        tree = tree[first]
        begin, end = np.minimum.reduceat(begin, first), np.maximum.reduceat(end, first)
        tokens = np.add.reduceat(tokens, first)
    return replace(groups, indptr=groups.indptr[np.append(start, -1)], row_begin=begin, row_end=end)


def _disjoint(pairs: Bools) -> Ints:
    """Every other one of each run of true entries: pairs (i, i + 1) with no member in common."""
    index = np.arange(len(pairs))
    run_start = np.maximum.accumulate(np.where(pairs, -1, index))
    return np.flatnonzero(pairs & ((index - run_start) % 2 == 1))

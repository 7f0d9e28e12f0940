"""Which children read their parent's KV for themselves, and the groups that come of it.

A child that joins takes its rows out of its parent's item and the parent's tokens into its own; so
on upwards, if the parent has joined its own parent. What is left of the parent's rows falls into
intervals, each a group of its own; where every child has joined, nothing is left.
"""

from __future__ import annotations

import numpy as np

from deft_tvm.arrays import offsets
from deft_tvm.plan.clusters import Bools, Clusters
from deft_tvm.plan.cost import Ints, Prices
from deft_tvm.plan.split import Groups, Walk, ancestors, ranges


def hand_down(clusters: Clusters, prices: Prices) -> Bools:
    """bool[C]: whether each cluster reads its parent's KV, and all that it has from above, itself.

    The edges are judged alone first; those that would be taken are judged again with the tokens
    which their parent would have from above.
    """
    joins = np.zeros(len(clusters), bool)
    child = np.flatnonzero((clusters.parent >= 0) & (clusters.rows > 0))
    if not len(child):
        return joins
    parent = clusters.parent[child]
    tokens, rows, above = clusters.tokens[child], clusters.rows[child], clusters.tokens[parent]
    share = clusters.cost[parent] * rows / clusters.rows[parent]
    # A row that has no other partial is spared both, and goes straight to the output.
    last = (clusters.parent[parent] < 0) & (clusters.own_rows[child] == rows)
    saved = share + prices.partial_seconds * rows * np.where(last, 2, 1) * (above > 0)
    saved += clusters.cost[child]
    joins[child] = prices.cost(tokens + above, rows, clusters.balanced)[0] <= saved
    if joins.any():
        above = _sums_above(clusters, joins, clusters.tokens)[parent] + above
        joins[child] &= prices.cost(tokens + above, rows, clusters.balanced)[0] <= saved
        joins[child] &= above > 0
    return joins


def by_cluster(clusters: Clusters, joins: Bools) -> tuple[Groups, Bools]:
    """The clusters as groups, and bool[G]: which hold one cluster alone with all its rows."""
    if not joins.any():
        owner = np.arange(len(clusters)).repeat(clusters.end - clusters.begin)
        groups, _ = _gather(clusters.walk, owner, None, clusters.row_begin, clusters.row_end)
        return groups, np.ones(len(groups), bool)
    cluster, row_begin, row_end = _remaining_rows(clusters, joins)
    above = _sums_above(clusters, joins, np.ones_like(clusters.begin))[cluster]
    group, read = ancestors(clusters.parent, cluster, above + 1)
    entry, within = ranges((clusters.end - clusters.begin)[read])
    node = clusters.begin[read][entry] + within
    groups, kept = _gather(clusters.walk, group[entry], node, row_begin, row_end)
    entire = row_end - row_begin == clusters.rows[cluster]
    return groups, (entire & (above == 0))[kept]


def _sums_above(clusters: Clusters, joins: Bools, values: Ints) -> Ints:
    """int[C], sum of `values` over the clusters that each reaches upwards by way of `joins`."""
    up = np.where(joins, clusters.parent, -1)
    total = np.where(joins, values[clusters.parent], 0)
    while (up >= 0).any():
        total = total + np.where(up >= 0, total[up], 0)
        up = np.where(up >= 0, up[up], -1)
    return total


def _remaining_rows(clusters: Clusters, joins: Bools) -> tuple[Ints, Ints, Ints]:
    """The intervals of rows that stay with each cluster when some below it have joined.

    Returns:
        The cluster of each interval, its first row, and one past its last.
    """
    own = np.flatnonzero(clusters.own_rows)
    stays = np.flatnonzero(~joins & (clusters.parent >= 0) & (clusters.rows > 0))
    cluster = np.concatenate((own, clusters.parent[stays]))
    begin = np.concatenate((clusters.row_begin[own], clusters.row_begin[stays]))
    end = np.concatenate(
        (clusters.row_begin[own] + clusters.own_rows[own], clusters.row_end[stays])
    )
    order = np.lexsort((begin, cluster))
    cluster, begin, end = cluster[order], begin[order], end[order]
    new = np.append(True, (cluster[1:] != cluster[:-1]) | (begin[1:] != end[:-1]))
    return cluster[new], begin[new], end[np.append(new[1:], True)]


def _gather(
    walk: Walk, group: Ints, node: Ints | None, row_begin: Ints, row_end: Ints
) -> tuple[Groups, Ints]:
    """Groups of nodes, entry by entry of `group`, and which are not empty; None: all, in order."""
    length = walk.length if node is None else walk.length[node]
    tokens = length.nonzero()[0]
    counts = np.bincount(group[tokens], minlength=len(row_begin))
    kept = counts.nonzero()[0]
    node = tokens if node is None else node[tokens]
    groups = Groups(
        node=node,
        begin=np.zeros_like(node),
        end=length[tokens],
        indptr=offsets(counts[kept]),
        row_begin=row_begin[kept],
        row_end=row_end[kept],
    )
    return groups, kept

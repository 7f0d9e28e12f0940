"""Which rows read which KV together: the groupings, and how a group is cut into work items.

A grouping is a list of *pieces*, token ranges of nodes, in reading order and divided into groups,
and for each group the interval of rows it answers for. Every (row, token) pair that is visible
lies in exactly one group. DeFT (ICLR 2025, section 3.2) names three of them:

    node        a group for each node
    node_chunk  the same, long nodes cut every `chunk` tokens
    flatten     one group of all nodes in depth-first order, cut every `chunk` tokens

and `sequence` is decoding without sharing: a group for each node with rows, its whole path. Nodes
are named by their place in depth-first order, so that a subtree is a range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.arrays import Int32, offsets
from deft_tvm.plan.cost import Ints

if TYPE_CHECKING:
    from deft_tvm.tree import Forest


@dataclass(frozen=True, eq=False)
class Walk:
    """A forest's nodes in depth-first order, one array entry each.

    Attributes:
        node: the caller's number.
        parent: place of the parent in the walk, -1 for a root.
        subtree_end: the subtree is ``[place, subtree_end)``.
        length: KV tokens that any row sees, but for `skip`.
        skip: tokens at the node's beginning that no row sees any more, through the window; tokens
            of a node are counted from here on.
        row_begin: first row of the subtree, its own rows first.
        row_end: one past the last.
        own_rows: rows of the node itself.
        diagonal: tokens that all rows of the subtree see, windows apart.
        start: tokens on the path above.
        positions: int[R], path position of each row, where there is a window.
        window: positions that a row sees, its own included; None for all.
    """

    node: Ints
    parent: Ints
    subtree_end: Ints
    length: Ints
    skip: Ints
    row_begin: Ints
    row_end: Ints
    own_rows: Ints
    diagonal: Ints
    start: Ints
    positions: Int32
    window: int | None

    @classmethod
    def of(cls, forest: Forest, window: int | None = None) -> Walk:
        order = forest.preorder
        above = forest.parents[order]
        parent = forest.position[above]
        parent[above < 0] = -1
        row_begin, row_end = forest.row_begin[order], forest.row_end[order]
        length = forest.lengths[order] * (row_end > row_begin)
        positions, skip = forest.row_order[:0], np.zeros_like(length)
        if window is not None:
            positions = forest.row_positions
            seen = length > 0
            first = interval_minima(positions, row_begin[seen], row_end[seen]) - window + 1
            skip[seen] = np.clip(first - forest.start[order][seen], 0, length[seen])
        return cls(
            node=order,
            parent=parent,
            subtree_end=forest.subtree_end[order],
            length=length - skip,
            skip=skip,
            row_begin=row_begin,
            row_end=row_end,
            own_rows=forest.rows[order],
            diagonal=forest.diagonal[order] - skip,
            start=forest.start[order],
            positions=positions,
            window=window,
        )

    def paths(self) -> tuple[Ints, Ints]:
        """Tokens on the path to each node with rows that see any, and how many rows."""
        tokens = self.start.astype(np.int64) + self.skip + self.length
        holder = (self.own_rows > 0) & (tokens > 0)
        tokens, rows = tokens[holder], self.own_rows[holder]
        return (tokens if self.window is None else tokens.clip(max=self.window + rows - 1)), rows

    def path_nodes(self) -> Ints:
        """Nodes on the path to each node, itself included."""
        ended = np.bincount(self.subtree_end, minlength=len(self.node) + 1)[:-1]
        return np.arange(1, len(self.node) + 1) - ended.cumsum()


@dataclass(frozen=True, eq=False)
class Groups:
    """Pieces of KV in reading order, divided into groups.

    Attributes:
        node: int[P], place of the node in the walk.
        begin: int[P], first token within the node.
        end: int[P], one past the last; no piece is empty.
        indptr: int[G + 1], pieces of group g are ``indptr[g]:indptr[g + 1]``; no group is empty.
        row_begin: int[G], first row that the group answers for.
        row_end: int[G], one past the last.
    """

    node: Ints
    begin: Ints
    end: Ints
    indptr: Ints
    row_begin: Ints
    row_end: Ints

    def __len__(self) -> int:
        return len(self.row_begin)

    @cached_property
    def owner(self) -> Ints:
        """int[P], the group of each piece."""
        return np.arange(len(self)).repeat(self.pieces)

    @cached_property
    def pieces(self) -> Ints:
        """int[G], how many there are of each group."""
        return self.indptr[1:] - self.indptr[:-1]

    @cached_property
    def before(self) -> Ints:
        """int[P + 1], tokens of all groups before each piece, and at the end of all."""
        return offsets(self.end - self.begin)

    @cached_property
    def first(self) -> Ints:
        """int[P], tokens of the group before each piece."""
        return self.before[:-1] - self.before[self.indptr[:-1]][self.owner]

    @cached_property
    def tokens(self) -> Ints:
        """int[G]."""
        ends = self.before[self.indptr]
        return ends[1:] - ends[:-1]

    @property
    def rows(self) -> Ints:
        """int[G]."""
        return self.row_end - self.row_begin

    def moved(self, skip: Ints) -> Groups:
        """The same with tokens counted from each node's own beginning."""
        by = skip[self.node]
        return replace(self, begin=self.begin + by, end=self.end + by)


def ranges(counts: Ints) -> tuple[Ints, Ints]:
    """For ranges of the given lengths laid end to end: whose each entry is, and which within it."""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def by_node(walk: Walk) -> Groups:
    """A group for each node that any row sees."""
    node = np.flatnonzero(walk.length)
    return Groups(
        node=node,
        begin=np.zeros_like(node),
        end=walk.length[node],
        indptr=np.arange(len(node) + 1),
        row_begin=walk.row_begin[node],
        row_end=walk.row_end[node],
    )


def flattened(walk: Walk) -> Groups:
    """One group of all nodes, depth first."""
    nodes = by_node(walk)
    if not len(nodes):
        return nodes
    everything = walk.row_begin[:1] * 0
    return replace(
        nodes,
        indptr=np.array([0, len(nodes)]),
        row_begin=everything,
        row_end=everything + walk.row_end.max(),
    )


def by_sequence(walk: Walk) -> Groups:
    """A group for each node with rows of its own: the whole path to it."""
    holder = np.flatnonzero(walk.own_rows)
    owner, node = ancestors(walk.parent, holder, walk.path_nodes()[holder])
    owner, node = owner[walk.length[node] > 0], node[walk.length[node] > 0]
    counts = np.bincount(owner, minlength=len(holder))
    holder = holder[counts > 0]
    return Groups(
        node=node,
        begin=np.zeros_like(node),
        end=walk.length[node],
        indptr=offsets(counts[counts > 0]),
        row_begin=walk.row_begin[holder],
        row_end=walk.row_begin[holder] + walk.own_rows[holder],
    )


def ancestors(parent: Ints, node: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """The last `counts` nodes of the path to each of `node`, top first, and whose path each is on.

    Every entry climbs by powers of two, so the depth costs its logarithm.
    """
    owner, within = ranges(counts)
    climb = (counts - 1)[owner] - within
    reached, step = node[owner], parent
    for bit in range(int(climb.max(initial=0)).bit_length()):
        reached = np.where(climb >> bit & 1, step[reached], reached)
        step = np.where(step < 0, -1, step[step])
    return owner, reached


def cut_tokens(walk: Walk, groups: Groups, chunk: Ints) -> Groups:
    """Cut each group every ``chunk[g]`` tokens; an item keeps the rows that see any of its tokens.

    Args:
        walk: the nodes.
        groups: what is cut.
        chunk: int[G], 1 or more.
    """
    if not (groups.tokens > chunk).any():
        return groups
    groups = _cut(groups, chunk)
    begin = walk.row_begin[groups.node] + np.maximum(0, groups.begin - walk.diagonal[groups.node])
    end = walk.row_end[groups.node]
    heads = groups.indptr[:-1]
    return replace(
        groups,
        row_begin=np.maximum(groups.row_begin, np.minimum.reduceat(begin, heads)),
        row_end=np.minimum(groups.row_end, np.maximum.reduceat(end, heads)),
    )


def _cut(groups: Groups, chunk: Ints) -> Groups:
    size, last = chunk[groups.owner], groups.first + groups.end - groups.begin
    quotient = groups.first // size
    piece, within = ranges((last - 1) // size - quotient + 1)
    size, first = size[piece], groups.first[piece]
    quotient = quotient[piece] + within
    shift = groups.begin[piece] - first
    items = -(-groups.tokens // chunk)
    item = (items.cumsum() - items)[groups.owner][piece] + quotient
    group = np.repeat(np.arange(len(groups)), items)
    return Groups(
        node=groups.node[piece],
        begin=np.maximum(quotient * size, first) + shift,
        end=np.minimum(quotient * size + size, last[piece]) + shift,
        indptr=np.searchsorted(item, np.arange(len(group) + 1)),
        row_begin=groups.row_begin[group],
        row_end=groups.row_end[group],
    )


def cut_rows(walk: Walk, groups: Groups, most: int, step: int) -> Groups:
    """Cut each group into as few blocks of at most `most` rows as do, which read again what they
    see of its KV. All have as many rows, a multiple of `step`, but for the last."""
    if not (groups.rows > most).any():
        return groups
    fewest = -(-groups.rows // most)
    rows = np.minimum(-(-groups.rows // (fewest * step)) * step, most)
    blocks = -(-groups.rows // rows)
    group, block = ranges(blocks)
    row_begin = groups.row_begin[group] + block * rows[group]
    row_end = np.minimum(row_begin + rows[group], groups.row_end[group])
    item, within = ranges(groups.pieces[group])
    piece = groups.indptr[:-1][group][item] + within
    end = _visible_end(walk, groups, piece, row_begin[item], row_end[item])
    kept = end > groups.begin[piece]
    counts = np.bincount(item[kept], minlength=len(group))
    piece, some = piece[kept], counts > 0
    return Groups(
        node=groups.node[piece],
        begin=groups.begin[piece],
        end=end[kept],
        indptr=offsets(counts[some]),
        row_begin=row_begin[some],
        row_end=row_end[some],
    )


def cut_window(walk: Walk, groups: Groups) -> Groups:
    """Leave out the tokens at each piece's beginning that none of its group's rows sees."""
    if walk.window is None or not len(groups):
        return groups
    node, owner = groups.node, groups.owner
    row_begin = np.maximum(walk.row_begin[node], groups.row_begin[owner])
    row_end = np.minimum(walk.row_end[node], groups.row_end[owner])
    first = interval_minima(walk.positions, row_begin, row_end) - walk.window + 1
    begin = np.maximum(groups.begin, first - walk.start[node] - walk.skip[node])
    kept = begin < groups.end
    counts = np.bincount(owner[kept], minlength=len(groups))
    return Groups(
        node=node[kept],
        begin=begin[kept],
        end=groups.end[kept],
        indptr=offsets(counts[counts > 0]),
        row_begin=groups.row_begin[counts > 0],
        row_end=groups.row_end[counts > 0],
    )


def interval_minima(values: Ints, begin: Ints, end: Ints) -> Ints:
    """The smallest of ``values[begin:end]`` for each interval, none of them empty.

    Two overlapping ranges of a power of two cover any interval.
    """
    level = np.frexp(end - begin)[1] - 1
    minima = np.empty(len(begin), values.dtype)
    table = values
    for power in range(int(level.max(initial=-1)) + 1):
        if power:
            half = 1 << power - 1
            table = np.minimum(table[:-half], table[half:])
        here = level == power
        minima[here] = np.minimum(table[begin[here]], table[end[here] - (1 << power)])
    return minima


def _visible_end(walk: Walk, groups: Groups, piece: Ints, row_begin: Ints, row_end: Ints) -> Ints:
    """One past the last token of each piece that any of the rows sees; 0 if none does."""
    node = groups.node[piece]
    seen_by_last = walk.diagonal[node] + row_end - walk.row_begin[node]
    apart = (row_begin >= walk.row_end[node]) | (row_end <= walk.row_begin[node])
    return np.where(apart, 0, np.minimum(groups.end[piece], seen_by_last))

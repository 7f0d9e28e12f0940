"""Which rows read which tokens in one call: a forest cut into pieces, pieces put into batches.

Rows are numbered in depth-first order, so that those of a subtree are neighbours. Each row finds
every token that it sees in one piece, and pieces of one depth share no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deft_tvm.arrays import consecutive
from deft_tvm.peers.gathered import Gathered
from deft_tvm.tree import Forest

# Costs in products of one lane row (a query head of a row) and one token, of all KV heads: what an
# AMD EPYC Zen 4 with two cores takes for 8 heads of 128 columns (2026-11-21).
FEWEST_LANES = 8
"""A product of fewer lane rows takes as long."""
MERGE_COST = 16
"""Of merging one lane row into what was found before."""
PIECE_COST = 200
CALL_COST = 600


@dataclass(frozen=True)
class Piece:
    """Preorder rows [begin, end) and the tokens, int64[n], that they read together.

    Attributes:
        depth: 0 where these rows read nothing before, in a piece of a lower depth.
    """

    begin: int
    end: int
    tokens: Tensor
    depth: int


@dataclass(frozen=True)
class Batch:
    """Pieces with as many rows each, evenly spaced, that one call reads.

    Attributes:
        begin: first preorder row of the first piece.
        step: rows from one piece to the next.
        rows: rows of each.
        tokens: int64[pieces, n]; shorter pieces are filled up with tokens that are masked.
        seen: bool[pieces, rows, n], or None where every row sees all.
        first: these rows read nothing before.
    """

    begin: int
    step: int
    rows: int
    tokens: Tensor
    seen: Tensor | None
    first: bool

    def lanes(self, x: Tensor, group: int) -> Tensor:
        """Of [KV heads, all rows · group, width] the view [pieces, KV heads, rows · group, width]
        that the call reads or writes."""
        heads, _, width = x.shape
        of_head, of_lane, _ = x.stride()
        begin = x[:, self.begin * group :]
        return begin.as_strided(
            (len(self.tokens), heads, self.rows * group, width),
            (self.step * group * of_lane, of_head, of_lane, 1),
        )

    def bias(self, group: int, dtype: torch.dtype) -> Tensor | None:
        """[pieces, 1, rows · group, n], 0 or -∞, as SDPA takes a mask best: of q's type."""
        if self.seen is None:
            return None
        unseen = ~self.seen.repeat_interleave(group, 1).unsqueeze(1)
        return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)


def by_tree(gathered: Gathered) -> list[Piece]:
    """One piece for each tree."""
    seen = gathered.seen
    return [
        piece
        for begin, end in tree_rows(gathered.case.forest)
        for piece in _piece(seen, begin, end, seen[begin:end].any(0), 0)
    ]


def by_prefix(gathered: Gathered) -> list[Piece]:
    """For each tree the tokens that all its rows see, then all the others."""
    seen, pieces = gathered.seen, []
    for begin, end in tree_rows(gathered.case.forest):
        shared = seen[begin:end].all(0)
        prefix = list(_piece(seen, begin, end, shared, 0))
        pieces += [*prefix, *_piece(seen, begin, end, ~shared, len(prefix))]
    return pieces


def by_level(gathered: Gathered) -> list[Piece]:
    """A piece for each run of nodes with the same rows below, but where fewer are faster.

    A run is read alone, or with all its descendants, or they are read together after it: the
    cheapest, found from the leaves up.
    """
    forest, seen = gathered.case.forest, gathered.seen
    cut, runs_on = _cut(forest, gathered.case.spec.group)
    first_token = np.cumsum(forest.lengths) - forest.lengths
    pieces: list[Piece] = []
    depth = np.zeros(forest.num_rows, np.int64)

    def add(nodes: Sequence[int], begin: int, end: int) -> None:
        chosen = np.asarray(nodes, np.int64)
        wanted = torch.zeros(seen.shape[1], dtype=torch.bool)
        wanted[torch.from_numpy(consecutive(first_token[chosen], forest.lengths[chosen]))] = True
        for piece in _piece(seen, begin, end, wanted, int(depth[begin])):
            pieces.append(piece)
            depth[begin:end] += 1

    place, run = 0, []
    while place < forest.num_nodes:
        node = int(forest.preorder[place])
        begin, end = int(forest.row_begin[node]), int(forest.row_end[node])
        below = forest.preorder[place + 1 : forest.subtree_end[node]].tolist()
        place = place + 1 if cut[node] == _ALONE and begin < end else int(forest.subtree_end[node])
        if begin == end:
            continue
        run.append(node)
        if cut[node] == _ALONE and runs_on[node]:
            continue
        add([*run, *below] if cut[node] == _WHOLE else run, begin, end)
        own_end = begin + int(forest.rows[node])
        if cut[node] == _BELOW and own_end < end:
            add(below, own_end, end)
        run = []
    return pieces


def batches(gathered: Gathered, pieces: Sequence[Piece]) -> list[Batch]:
    """What calls read, lower depths first.

    Pieces of a depth with as many rows each and as far apart are one batch while filling up the
    shorter ones costs less than the calls that are saved.
    """
    group, made = gathered.case.spec.group, []
    waiting: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.depth, p.end - p.begin, p.begin)):
        if waiting and not _joins(waiting, piece, group):
            made.append(_batch(gathered.seen, waiting))
            waiting = []
        waiting.append(piece)
    if waiting:
        made.append(_batch(gathered.seen, waiting))
    return made


_ALONE, _WHOLE, _BELOW = range(3)


def _cut(forest: Forest, group: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """How each node is best read, and whether the rows of a child are exactly its own."""
    begin, end = forest.row_begin, forest.row_end
    tokens = forest.lengths.astype(np.int64)
    lanes = np.maximum((end - begin) * group, FEWEST_LANES)
    lanes_below = np.maximum((end - begin - forest.rows) * group, FEWEST_LANES)
    alike = Counter(zip(forest.level.tolist(), (end - begin).tolist(), strict=True))
    below, below_best = np.zeros(forest.num_nodes, np.int64), np.zeros(forest.num_nodes)
    cut = np.zeros(forest.num_nodes, np.int64)
    runs_on = np.zeros(forest.num_nodes, bool)
    for node in forest.preorder[::-1].tolist():
        if begin[node] == end[node]:
            continue
        fixed = PIECE_COST + CALL_COST / alike[forest.level[node], end[node] - begin[node]]
        own = lanes[node] * tokens[node]
        if tokens[node] and not runs_on[node]:
            own += fixed + MERGE_COST * lanes[node]
        rest = lanes_below[node] * (below[node] + MERGE_COST) + PIECE_COST + CALL_COST
        whole = lanes[node] * (tokens[node] + below[node] + MERGE_COST) + fixed
        costs = (own + below_best[node], whole, own + rest)
        cut[node] = int(np.argmin(costs)) if below[node] else _ALONE
        parent = forest.parents[node]
        if parent >= 0:
            below[parent] += tokens[node] + below[node]
            below_best[parent] += costs[cut[node]]
            runs_on[parent] |= begin[node] == begin[parent] and end[node] == end[parent]
    return cut, runs_on


def tree_rows(forest: Forest) -> Iterator[tuple[int, int]]:
    """Preorder rows of every tree that has any."""
    for root in np.flatnonzero(forest.parents < 0).tolist():
        if forest.row_begin[root] < forest.row_end[root]:
            yield int(forest.row_begin[root]), int(forest.row_end[root])


def _piece(seen: Tensor, begin: int, end: int, wanted: Tensor, depth: int) -> Iterator[Piece]:
    """Of those tokens that any of these rows sees; nothing where there are none."""
    tokens = (seen[begin:end].any(0) & wanted).nonzero().squeeze(1)
    if len(tokens):
        yield Piece(begin, end, tokens, depth)


def _joins(pieces: Sequence[Piece], piece: Piece, group: int) -> bool:
    first, last = pieces[0], pieces[-1]
    rows = piece.end - piece.begin
    if (piece.depth, rows) != (first.depth, first.end - first.begin):
        return False
    if len(pieces) > 1 and piece.begin - last.begin != pieces[1].begin - first.begin:
        return False
    lengths = [len(p.tokens) for p in (*pieces, piece)]
    empty = max(lengths) * len(lengths) - sum(lengths)
    return empty * max(rows * group, FEWEST_LANES) <= CALL_COST * len(pieces)


def _batch(seen: Tensor, pieces: Sequence[Piece]) -> Batch:
    first = pieces[0]
    rows, most = first.end - first.begin, max(len(p.tokens) for p in pieces)
    tokens = first.tokens.new_zeros(len(pieces), most)
    visible = torch.zeros(len(pieces), rows, most, dtype=torch.bool)
    for i, piece in enumerate(pieces):
        tokens[i, : len(piece.tokens)] = piece.tokens
        visible[i, :, : len(piece.tokens)] = seen[piece.begin : piece.end, piece.tokens]
    step = pieces[1].begin - first.begin if len(pieces) > 1 else rows
    return Batch(
        first.begin, step, rows, tokens, None if visible.all() else visible, first.depth == 0
    )

"""Context parallelism: the forest as a rank sees it that holds a part of every node's KV.

Attention over disjoint sets of tokens merges by log-sum-exp, so each of several ranks may hold
another part of the cache and answer for all rows; `deft_tvm.merge_ranks` makes one of the answers.

A part of a node is a range of its tokens. Rows are a node's last tokens and see each other
causally, so that either all of them are in the part, or none: then all that it holds of the node is
seen by all of the node's rows, which stand in an empty node below it. ::

    part 0 of 2: 0 (500 tokens) ── 1 (0 tokens, 2 rows)
    part 1 of 2: 0 (500 tokens, the last 2 have rows)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from deft_tvm.arrays import Int32, int32_array, read_only, whole
from deft_tvm.errors import PageError, TreeError
from deft_tvm.pages import PageTable
from deft_tvm.tree import Forest


def divide_context(forest: Forest, rank: int, world: int, unit: int = 1) -> tuple[Int32, Int32]:
    """Even parts: of each node the tokens ``[begin, end)`` that one of `world` ranks holds.

    Args:
        forest: all trees.
        rank: which part, 0 to ``world - 1``.
        world: how many there are.
        unit: parts begin at a multiple of so many tokens, such as the page size, and end at one,
            unless a node ends before.

    Returns:
        int32[nodes] twice. Tokens with rows all go to the last rank that has any of the node.

    Raises:
        TreeError: `rank` is none of `world`, or `unit` is no positive number.
    """
    if not 0 <= whole("rank", rank, TreeError) < whole("world", world, TreeError):
        raise TreeError(f"rank is {rank}; expected one of 0 to {world - 1}")
    if whole("unit", unit, TreeError) < 1:
        raise TreeError(f"unit is {unit}; expected 1 or more tokens")
    units = -(-forest.lengths.astype(np.int64) // unit)
    first, last = (
        np.minimum(units * part // world * unit, forest.lengths) for part in (rank, rank + 1)
    )
    # A cut among tokens with rows moves to the node's end.
    begin, end = (np.where(_may_cut(forest, cut), cut, forest.lengths) for cut in (first, last))
    return read_only(begin.astype(np.int32)), read_only(end.astype(np.int32))


def context_part(
    forest: Forest, begin: ArrayLike, end: ArrayLike, pages: PageTable | None = None
) -> tuple[Forest, PageTable]:
    """What a rank plans that holds tokens ``[begin[n], end[n])`` of each node n.

    Args:
        forest: all trees.
        begin: int[nodes], first token of the node that the rank holds.
        end: int[nodes], one past the last.
        pages: where the rank's cache has them, a node for each of `forest`; by default back to
            back, node after node.

    Returns:
        A forest with the same rows in the same order, and its page table. No window can be planned
        on it, since it does not say where on their paths its tokens are.

    Raises:
        TreeError: a range is outside of its node, or divides tokens that have rows.
        PageError: `pages` has another number of nodes, or is contiguous.
    """
    first = int32_array("begin", begin, forest.num_nodes, TreeError)
    last = int32_array("end", end, forest.num_nodes, TreeError)
    _check_part(forest, first, last)
    if pages is not None and (pages.is_contiguous or pages.num_nodes != forest.num_nodes):
        raise PageError(
            f"pages are {pages}; expected those of {forest.num_nodes} nodes, or None for a cache "
            f"without pages"
        )
    held = last - first
    # Rows whose tokens are elsewhere while others of their node are here.
    apart = (forest.rows > 0) & (held > 0) & (last < forest.lengths)
    copies = 1 + apart
    origin = np.repeat(np.arange(forest.num_nodes), copies)
    place = np.cumsum(copies) - copies
    below = np.zeros(len(origin), bool)
    below[place[apart] + 1] = True
    parents = np.where(
        below, place[origin], np.where(forest.parents < 0, -1, place[forest.parents])[origin]
    )
    whole = Forest.from_parents(
        parents,
        np.where(below, 0, held[origin]),
        np.where(below == apart[origin], forest.rows[origin], 0),
        (forest.bidirectional > 0)[origin],
    )
    part = replace(whole, is_part=True)
    if pages is None:
        return part, PageTable.contiguous(part)
    counts = np.where(below, 0, np.diff(pages.page_indptr)[origin])
    first, last = pages.page_indptr[[0, -1]]
    table = PageTable(
        pages.page_indices[first:last],
        np.append(0, counts.cumsum()),
        np.where(below, 0, pages.first_slot[origin]),
        page_size=pages.page_size,
    )
    return part, table


def _may_cut(forest: Forest, cut: Int32) -> Int32:
    """Whether all tokens with rows are on one side."""
    return (forest.rows == 0) | (cut <= forest.lengths - forest.rows) | (cut == forest.lengths)


def _check_part(forest: Forest, begin: Int32, end: Int32) -> None:
    outside = np.flatnonzero((begin < 0) | (begin > end) | (end > forest.lengths))
    if outside.size:
        n = outside[0]
        raise TreeError(
            f"begin[{n}] is {begin[n]} and end[{n}] {end[n]}; expected a range within "
            f"lengths[{n}], which is {forest.lengths[n]}"
        )
    for name, cut in (("begin", begin), ("end", end)):
        wrong = np.flatnonzero(~_may_cut(forest, cut) & (begin < end))
        if wrong.size:
            n = wrong[0]
            length, rows = forest.lengths[n], forest.rows[n]
            raise TreeError(
                f"{name}[{n}] is {cut[n]}; expected {length - rows} or less, or {length}: the last "
                f"rows[{n}] = {rows} tokens stay together"
            )

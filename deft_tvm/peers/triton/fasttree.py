"""FastTree (Pan et al., MLSys 2025): work by node, where a child may read its parent's KV too.

Section 4 of the paper and its published constants: an edge is *copied* where the cost of padding
is lower if the child's rows read the parent's context along with the child's own, and the parent's
work is left to the other rows. Rows of a node are tiled by 64 lanes, or by 16 where they are few,
and KV is cut at 1024 tokens, or at 128 where that leaves too few programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deft_tvm.peers.triton.plan import Plan, Tokens, Work
from deft_tvm.tree import Forest

PAD_ROWS, PAD_TOKENS, REDUCE = 0.66, 0.33, 0.1
"""α, β and γ: costs of a padded row and a padded token, and of merging one row."""
LANES = (64, 16)
KV_TILE = 32
"""Fewer tokens than this are padded, in the cost."""
SPLITS = (1024, 128)
FEW_PROGRAMS = (132, 528)
"""Of either kind of tile: fewer programs get shorter splits of KV."""
FEW_TILES = 132
"""Of either kind of tile: fewer programs, even so, take the other tile."""


@dataclass(frozen=True)
class Setting:
    """How work is tiled; a pair is of nodes of many rows, then of few.

    Attributes:
        lanes: of a tile.
        splits: tokens at which KV is cut.
    """

    lanes: tuple[int, int] = LANES
    splits: tuple[int, int] = (SPLITS[0], SPLITS[0])

    def rows(self, few: bool, group: int) -> int:
        """Of a tile."""
        return max(1, self.lanes[few] // group)

    def few(self, rows: int, group: int) -> bool:
        """Whether a node of so many rows has few."""
        return rows <= self.rows(True, group)


@dataclass(frozen=True)
class Node:
    """A node's work: the rows that do not copy its context, and all nodes they read with it."""

    path: list[int]
    rows: NDArray[np.int64]
    tokens: int


def fasttree(forest: Forest, kv_heads: int, group: int, split: int | None = None) -> Plan:
    """The plan that the paper's rules make; with `split` KV is cut at that instead."""
    if split is None:
        setting, nodes = _published(forest, kv_heads, group)
    else:
        setting = Setting(splits=(split, split))
        nodes = _nodes(forest, copied_edges(forest, group, setting))
    tokens = Tokens.of_nodes(forest, np.array([n for node in nodes for n in node.path], np.int64))
    return Plan.of(forest, tokens, _works(nodes, tokens, group, setting), group)


def _published(forest: Forest, kv_heads: int, group: int) -> tuple[Setting, list[Node]]:
    """Splits get shorter where programs are few; where they are still, one tile takes all."""
    setting = Setting()
    nodes = _nodes(forest, copied_edges(forest, group, setting))
    programs = _programs(nodes, kv_heads, group, setting)
    long, short = SPLITS
    splits = [short if 0 < n < few else long for n, few in zip(programs, FEW_PROGRAMS, strict=True)]
    setting = replace(setting, splits=(splits[0], splits[1]))
    programs = _programs(nodes, kv_heads, group, setting)
    if short not in splits:
        return setting, nodes
    if 0 < programs[0] < FEW_TILES:
        setting = replace(setting, lanes=(LANES[1], LANES[1]))
    elif 0 < programs[1] < FEW_TILES:
        setting = replace(setting, lanes=(LANES[0], LANES[0]))
    return setting, _nodes(forest, copied_edges(forest, group, setting))


def copied_edges(forest: Forest, group: int, setting: Setting) -> NDArray[np.bool_]:
    """bool[nodes], whether a node's rows read its parent's context along with its own.

    Greedy, parents first: what is decided for a node changes how many rows its parent has left,
    and how long the context is that its children may copy.
    """
    copied = np.zeros(forest.num_nodes, bool)
    left = (forest.row_end - forest.row_begin).tolist()
    below = list(left)
    context, parents = forest.lengths.tolist(), forest.parents.tolist()

    def cost(rows: int, tokens: int) -> float:
        few = setting.few(rows, group)
        pad_rows = -rows % setting.rows(few, group)
        pad_tokens = max(0, KV_TILE - tokens)
        return group * (PAD_ROWS * pad_rows * tokens + PAD_TOKENS * pad_tokens * rows)

    for node in np.argsort(forest.level, kind="stable").tolist():
        above = parents[node]
        if above < 0 or not below[node]:
            continue
        rows, own, shared = below[node], context[node], context[above]
        split = cost(left[above], shared) + cost(rows, own) + REDUCE * rows
        copy = cost(left[above] - rows, shared) + cost(rows, own + shared)
        if split > copy:
            copied[node] = True
            left[above] -= rows
            context[node] += shared
    return copied


def _nodes(forest: Forest, copied: NDArray[np.bool_]) -> list[Node]:
    """The nodes that have both rows left and tokens, in depth-first order."""
    parents, lengths = forest.parents.tolist(), forest.lengths.tolist()
    leaving: list[list[int]] = [[] for _ in parents]
    for node in np.flatnonzero(copied).tolist():
        leaving[parents[node]].append(node)
    found = []
    for node in forest.preorder.tolist():
        begin, end = int(forest.row_begin[node]), int(forest.row_end[node])
        stays = np.ones(end - begin, bool)
        for child in leaving[node]:
            stays[forest.row_begin[child] - begin : forest.row_end[child] - begin] = False
        path = [node]
        while copied[path[-1]]:
            path.append(parents[path[-1]])
        tokens = sum(lengths[n] for n in path)
        if tokens and stays.any():
            found.append(Node(path[::-1], begin + np.flatnonzero(stays), tokens))
    return found


def _programs(nodes: list[Node], kv_heads: int, group: int, setting: Setting) -> tuple[int, int]:
    """Of nodes of many rows, and of few."""
    programs = [0, 0]
    for node in nodes:
        few = setting.few(len(node.rows), group)
        tiles = -(-len(node.rows) // setting.rows(few, group))
        programs[few] += kv_heads * tiles * -(-node.tokens // setting.splits[few])
    return programs[0], programs[1]


def _works(nodes: list[Node], tokens: Tokens, group: int, setting: Setting) -> Iterator[Work]:
    first = 0
    for node in nodes:
        few = setting.few(len(node.rows), group)
        for begin in range(first, first + node.tokens, setting.splits[few]):
            end = min(begin + setting.splits[few], first + node.tokens)
            sees = np.intersect1d(node.rows, tokens.rows(begin, end), assume_unique=True)
            # The rows that whole tiles leave over may be few.
            whole = len(sees) - len(sees) % setting.rows(few, group)
            for rows in (sees[:whole], sees[whole:]):
                if len(rows):
                    lanes = setting.lanes[setting.few(len(rows), group)]
                    yield Work(begin, end, rows, lanes)
        first += node.tokens

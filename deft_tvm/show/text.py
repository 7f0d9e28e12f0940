"""Trees and plans in characters; what is too much is counted instead of drawn.

::

    0: 1000 tokens                   r64t64f32: 4 items of 232 to 256 tokens
    ├─ 1: 64 tokens, 1 row               256 ████████ rows 0 to 9, node 0 [0, 256)
    ├─ 2: 64 tokens, 1 row               256 ████████ rows 0 to 9, node 0 [256, 512)
    ├─ 3: 64 tokens, 1 row               256 ████████ rows 0 to 9, node 0 [512, 768)
    └─ … 7 more nodes of 64 tokens       232 ███████▎ rows 0 to 9, node 0 [768, 1000)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deft_tvm.plan import Plan
from deft_tvm.plan.columns import Item
from deft_tvm.tree import Forest

MOST_CHILDREN = 4
MOST_LEVELS = 12
MOST_LINES = 60
MOST_ITEMS = 6
MOST_PIECES = 3
BAR_WIDTH = 20
EIGHTHS = " ▏▎▍▌▋▊▉"

Nodes = list[int]
Group = tuple[Nodes, bool]
"""Siblings, and whether they are only counted; a node that is drawn is a group of its own."""


def tree(
    forest: Forest,
    label: Callable[[int], str] | None = None,
    most_children: int = MOST_CHILDREN,
) -> str:
    """A line for each node, children below their parent.

    Of more than `most_children` siblings, levels beyond `MOST_LEVELS` and lines beyond
    `MOST_LINES` only numbers are told; siblings with children are shown before those without.

    Args:
        forest: what to draw.
        label: what to say of a node; by default its number, its tokens and its rows.
        most_children: see above.
    """
    lines, drawn = [forest_size(forest)], 0
    for line, nodes in _branches(forest, label or partial(_node, forest), most_children):
        if len(lines) > MOST_LINES:
            lines.append(f"… {forest.num_nodes - drawn} more nodes")
            break
        lines.append(line)
        drawn += nodes
    return "\n".join(lines)


def plan(plan: Plan) -> str:
    """The work items by tile class, dearest first, with a bar as long as the KV that they read."""
    most = int(plan.items[:, Item.NUM_TOKENS].max(initial=1))
    lines = [plan_size(plan)]
    for tile, begin, end in plan.launches:
        tokens = plan.items[begin:end, Item.NUM_TOKENS]
        lines.append(f"{plan.tiles[tile].name}: {_many(end - begin, 'item')} of {_span(tokens)}")
        shown = end if end - begin <= MOST_ITEMS + 1 else begin + MOST_ITEMS
        lines += [_item(plan, i, most) for i in range(begin, shown)]
        if shown < end:
            rest = plan.items[shown:end]
            rows = _span(rest[:, Item.NUM_ROWS], "row")
            tokens = _span(rest[:, Item.NUM_TOKENS])
            lines.append(f"  … {end - shown} more items of {tokens}, {rows}")
    return "\n".join([*lines, _merge(plan)])


def forest_size(forest: Forest) -> str:
    """One line."""
    trees = _many(int((forest.parents < 0).sum()), "tree")
    counts = ((forest.num_nodes, "node"), (forest.num_tokens, "token"), (forest.num_rows, "row"))
    return f"{trees}: {', '.join(_many(count, what) for count, what in counts)}"


def plan_size(plan: Plan) -> str:
    """One line."""
    counts = ((plan.num_items, "item"), (len(plan.runs), "run"), (plan.num_partials, "partial"))
    told = ", ".join(_many(count, what) for count, what in counts)
    return f"{plan.grouping}: {told} for {_many(plan.num_rows, 'row')}"


def pieces(plan: Plan, item: int) -> list[tuple[int, int, int]]:
    """The KV of an item: for each run the caller's node, its first token and one past its last."""
    runs = slice(*plan.items[item, Item.RUN_BEGIN : Item.RUN_END + 1].tolist())
    node = plan.forest.preorder[plan.groups.node[runs]]
    begin, end = plan.groups.begin[runs], plan.groups.end[runs]
    return list(zip(node.tolist(), begin.tolist(), end.tolist(), strict=True))


def _branches(forest: Forest, label: Callable[[int], str], most: int) -> Iterator[tuple[str, int]]:
    """The lines of a tree, and how many nodes each stands for."""
    children: list[Nodes] = [[] for _ in range(forest.num_nodes + 1)]
    for node, parent in enumerate(forest.parents.tolist()):
        children[parent].append(node)
    waiting = [(group, "", "", 1) for group in _cut(children, -1, most)[::-1]]
    while waiting:
        (nodes, hidden), fork, indent, level = waiting.pop()
        if hidden:
            below = np.concatenate([_subtree(forest, node) for node in nodes])
            yield fork + _elided(forest, below), len(below)
            continue
        (node,) = nodes
        yield fork + label(node), 1
        groups = _cut(children, node, most if level < MOST_LEVELS else 0)
        for place, group in enumerate(groups[::-1]):
            fork, bar = ("├─ ", "│  ") if place else ("└─ ", "   ")
            waiting.append((group, indent + fork, indent + bar, level + 1))


def _cut(children: list[Nodes], parent: int, most: int) -> list[Group]:
    """Children one by one, and those that are too many together at the end."""
    every = children[parent]
    if len(every) <= most:
        return [([node], False) for node in every]
    by_interest = sorted(every, key=lambda node: not children[node])
    shown = max(0, most - 1)
    return [*(([n], False) for n in sorted(by_interest[:shown])), (by_interest[shown:], True)]


def _subtree(forest: Forest, node: int) -> NDArray[np.int32]:
    return forest.preorder[forest.position[node] : forest.subtree_end[node]]


def _node(forest: Forest, node: int) -> str:
    rows = int(forest.rows[node])
    told = f"{node}: {_many(int(forest.lengths[node]), 'token')}"
    return f"{told}, {_many(rows, 'row')}" if rows else told


def _elided(forest: Forest, nodes: NDArray[np.int32]) -> str:
    rows = int(forest.rows[nodes].sum())
    told = f"… {_many(len(nodes), 'more node')} of {_span(forest.lengths[nodes])}"
    return f"{told}, {_many(rows, 'row')} in all" if rows else told


def _item(plan: Plan, item: int, most: int) -> str:
    row, rows, _, _, tokens, *_ = plan.items[item].tolist()
    which = f"row {row}" if rows == 1 else f"rows {row} to {row + rows - 1}"
    return f"{tokens:7} {_bar(tokens / most)} {which}, {_read(plan, item)}"


def _read(plan: Plan, item: int) -> str:
    """Which nodes an item reads; of a node that it reads in part, which tokens."""
    lengths = plan.forest.lengths
    every = pieces(plan, item)
    told = [
        str(node) if (begin, end) == (0, lengths[node]) else f"{node} [{begin}, {end})"
        for node, begin, end in every[:MOST_PIECES]
    ]
    if len(every) > MOST_PIECES:
        told.append(f"… {len(every) - MOST_PIECES} more")
    return f"node{'s' * (len(every) > 1)} {', '.join(told)}"


def _merge(plan: Plan) -> str:
    counts = np.diff(plan.merge_indptr)
    merged, empty = counts[counts > 0], int((counts == 0).sum())
    straight = plan.num_rows - len(counts)
    told = [f"{_many(straight, 'row')} written straight"] if straight else []
    told += [f"{_many(len(merged), 'row')} of {_span(merged, 'partial')}"] if len(merged) else []
    told += [f"{_many(empty, 'row')} with no KV"] if empty else []
    return "merge: " + ", ".join(told or ["no rows"])


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).ljust(BAR_WIDTH)[:BAR_WIDTH]


def _span(values: NDArray[np.int32], what: str = "token") -> str:
    low, high = int(values.min()), int(values.max())
    return _many(high, what) if low == high else f"{low} to {_many(high, what)}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

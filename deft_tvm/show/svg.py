"""Trees and plans as SVG: across, the path; down, the rows; so a node is as high as it is shared.

A node covers the rows that see it, which are neighbours because rows are numbered depth first.
Widths grow as the square root of tokens, so that a prompt leaves room for a draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deft_tvm.plan import Plan
from deft_tvm.plan.columns import Item
from deft_tvm.show.text import forest_size, pieces, plan_size
from deft_tvm.tree import Forest

Floats = NDArray[np.float64]

WIDTH, MARGIN = 960, 24
HEIGHT = 480
HIGHEST_ROW, LOWEST_ROW = 24.0, 2.0

NODE_FILL = "#8fb8de"
TILE_FILLS = (
    ("#8fb8de", "#b3d0ea"),
    ("#f2b279", "#f8d2b0"),
    ("#9fce97", "#c4e2be"),
    ("#d9a3c9", "#ead0e2"),
)
"""Two shades for each tile class, taken in turn, so that neighbouring items differ."""

SMALLEST_LABEL = (48.0, 14.0)
"""Boxes that are wider and higher have their label written inside."""


@dataclass(frozen=True, slots=True)
class Box:
    """Some tokens of a node and the rows that read them, in units of path and rows."""

    left: float
    right: float
    first_row: int
    last_row: int
    fill: str
    label: str
    tooltip: str


def tree_svg(forest: Forest) -> str:
    """A box for each node that some row sees. One self-contained string."""
    return _drawing(forest, forest_size(forest), _nodes(forest))


def plan_svg(plan: Plan) -> str:
    """A box for each run of KV of each work item, over the rows of the item; colour by tile class.

    One self-contained string.
    """
    return _drawing(plan.forest, plan_size(plan), _work(plan))


def _nodes(forest: Forest) -> Iterator[Box]:
    left, right = _columns(forest)
    for node, (tokens, rows) in enumerate(zip(forest.lengths, forest.rows, strict=True)):
        yield Box(
            left[node],
            right[node],
            int(forest.row_begin[node]),
            int(forest.row_end[node]),
            NODE_FILL,
            f"{node}: {tokens}",
            f"node {node}: {tokens} tokens, {rows} rows",
        )


def _work(plan: Plan) -> Iterator[Box]:
    left, right = _columns(plan.forest)
    for tile, first, last in plan.launches:
        shades = TILE_FILLS[tile % len(TILE_FILLS)]
        for item in range(first, last):
            row, rows = plan.items[item, : Item.NUM_ROWS + 1].tolist()
            for node, begin, end in pieces(plan, item):
                unit = (right[node] - left[node]) / plan.forest.lengths[node]
                yield Box(
                    left[node] + unit * begin,
                    left[node] + unit * end,
                    max(row, int(plan.forest.row_begin[node])),
                    min(row + rows, int(plan.forest.row_end[node])),
                    shades[item % 2],
                    f"{node}: {end - begin}",
                    f"item {item}, {plan.tiles[tile].name}: rows {row} to {row + rows - 1}, "
                    f"node {node}, tokens {begin} to {end - 1}",
                )


def _columns(forest: Forest) -> tuple[Floats, Floats]:
    """float64[nodes] twice: left and right edge, in square roots of tokens along the path."""
    width = np.sqrt(forest.lengths)
    left = np.zeros(forest.num_nodes)
    for node in forest.preorder.tolist():
        parent = forest.parents[node]
        left[node] = left[parent] + width[parent] if parent >= 0 else 0.0
    return left, left + width


def _drawing(forest: Forest, caption: str, boxes: Iterator[Box]) -> str:
    row = min(HIGHEST_ROW, max(LOWEST_ROW, HEIGHT / max(1, forest.num_rows)))
    height = 2.5 * MARGIN + row * forest.num_rows
    unit = (WIDTH - 2 * MARGIN) / max(1.0, float(_columns(forest)[1].max(initial=1)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN}">{caption}</text>',
    ]
    for box in boxes:
        if box.last_row > box.first_row and box.right > box.left:
            parts.append(_element(box, unit, row))
    return "\n".join([*parts, "</svg>"])


def _element(box: Box, unit: float, row: float) -> str:
    x, y = MARGIN + unit * box.left, 1.5 * MARGIN + row * box.first_row
    width, height = unit * (box.right - box.left), row * (box.last_row - box.first_row)
    drawn = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{box.fill}" stroke="#334" stroke-width="0.6"><title>{box.tooltip}</title></rect>'
    )
    if width < SMALLEST_LABEL[0] or height < SMALLEST_LABEL[1]:
        return drawn
    return f'{drawn}<text x="{x + 4:.1f}" y="{y + height / 2 + 4:.1f}">{box.label}</text>'

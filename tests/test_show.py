"""Drawings of trees and plans: text is compared with golden files, SVG is parsed."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from deft_tvm import show
from deft_tvm.device import DeviceProfile
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, make_plan
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse

Golden = Callable[[str], None]

TILES = (TileShape(64, 64, "float32"), TileShape(8, 32, "float32"))
SPEC = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)


def planned(forest: Forest, chunk: int) -> Plan:
    """By nodes cut every `chunk` tokens, so that no prices decide what is drawn."""
    pages = PageTable.contiguous(forest)
    profile = DeviceProfile.nominal()
    return make_plan(forest, pages, SPEC, TILES, profile, chunk=chunk, deterministic=True)


@pytest.fixture
def mixed() -> Forest:
    """The tree of `Forest`'s own drawing, with a row more."""
    return Forest.from_parents(
        [-1, 0, 0, 1, 1, 2, 2], [6, 3, 2, 4, 1, 0, 2], rows=[0, 0, 1, 1, 1, 2, 2]
    )


def test_tree_of_few_nodes(mixed: Forest, golden: Golden) -> None:
    golden(show.tree(mixed))


def test_tree_with_more_children_than_are_drawn(golden: Golden) -> None:
    golden(show.tree(parse("few_shot:vary=30").forest))


def test_tree_deeper_than_is_drawn(golden: Golden) -> None:
    golden(show.tree(Forest.from_parents(range(-1, 20_000 - 1), [1] * 20_000)))


def test_forest_with_more_lines_than_are_drawn(golden: Golden) -> None:
    golden(show.tree(parse("speculative:nodes=500,batch=3").forest))


def test_tree_without_nodes(golden: Golden) -> None:
    golden(show.tree(Forest.from_parents([], [])))


def test_plan_of_a_prompt_with_many_answers(golden: Golden) -> None:
    golden(show.plan(planned(parse("few_shot:prompt=1000,branches=10,vary=30").forest, 256)))


def test_plan_of_runs_from_many_nodes(mixed: Forest, golden: Golden) -> None:
    plan = make_plan(
        mixed, PageTable.contiguous(mixed), SPEC, TILES[:1], DeviceProfile.nominal(), "flatten", 8
    )
    golden(show.plan(plan))


def test_plan_with_a_row_that_sees_nothing(golden: Golden) -> None:
    golden(show.plan(planned(Forest.from_parents([-1, -1], [0, 3]), 16)))


def rectangles(svg: str) -> list[tuple[float, float, float]]:
    """Left, width and height of all boxes but the background."""
    boxes = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}rect")[1:]
    read = [[float(box.attrib[name]) for name in ("x", "width", "height")] for box in boxes]
    return [(left, width, height) for left, width, height in read]


def test_the_tree_as_svg_has_a_box_for_each_node_as_high_as_its_rows(mixed: Forest) -> None:
    boxes = rectangles(show.tree_svg(mixed))
    row = 24.0
    assert [round(height / row) for _, _, height in boxes] == [7, 2, 5, 1, 1, 2]
    left, width, _ = boxes[0]
    assert boxes[1][0] == pytest.approx(left + width, abs=0.11)


def test_the_plan_as_svg_covers_what_the_tree_covers_once(mixed: Forest) -> None:
    def area(svg: str) -> float:
        return sum(width * height for _, width, height in rectangles(svg))

    plan = planned(mixed, 2)
    assert len(rectangles(show.plan_svg(plan))) > mixed.num_nodes
    # Widths are printed with one decimal; each box may be off by 0.05 of at most 7 rows of 24.
    error = 0.05 * 7 * 24 * (len(plan.runs) + mixed.num_nodes)
    assert area(show.plan_svg(plan)) == pytest.approx(area(show.tree_svg(mixed)), abs=error)


def test_tooltips_name_the_item_and_its_tokens(mixed: Forest) -> None:
    svg = show.plan_svg(planned(mixed, 4))
    assert "item 0, r64t64f32: rows 0 to 6, node 0, tokens 0 to 3" in svg

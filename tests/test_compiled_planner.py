"""The compiled planner: the plans of the one in Python, bit for bit."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from built import SMALL, artifact
from cases import ARRAYS, SPEC, TILES, WIDE, assert_same, cases, plain, profile, profiles
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.artifact import Artifact
from deft_tvm.errors import PageError
from deft_tvm.native import PLANNER
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, Recipe, compiled, make_recipe
from deft_tvm.plan.buffer import PlanBuffer
from deft_tvm.plan.columns import COLUMNS, HEADER, Item, Run
from deft_tvm.plan.cost import CostModel
from deft_tvm.pytorch.plan_tensors import PlanTensors
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest

GROUPS = ("node", "begin", "end", "indptr", "row_begin", "row_end")


@pytest.mark.parametrize("table", [Item, Run])
def test_columns_are_numbered_alike(table: type[Item | Run]) -> None:
    text = Path(compiled.__file__).parents[1].joinpath("native", "plan_buffer.h").read_text("utf-8")
    prefix = table.__name__.upper()
    names = re.findall(rf"\b{prefix}_(\w+)", text)
    assert names == [column.name for column in table]
    assert [column.value for column in table] == list(range(COLUMNS))
    assert f"HEADER = {HEADER}, COLUMNS = {COLUMNS}" in text


@cache
def planner():
    return Artifact.load(artifact(SMALL)).planner


def recipe(spec: AttentionSpec, tiles, device, grouping: str = "auto", **how) -> Recipe:
    return make_recipe(spec, tiles, device, grouping, planner=planner(), **how)


def in_python(recipe: Recipe) -> Recipe:
    return replace(recipe, planner=None)


def in_one_buffer(plan: Plan) -> bool:
    return isinstance(plan.laid, PlanBuffer)


def assert_equal(made: Plan, oracle: Plan) -> None:
    assert in_one_buffer(made) and not in_one_buffer(oracle)
    assert_same(made, oracle)
    for part, wanted in zip(PlanTensors.of(made)[:2], PlanTensors.of(oracle)[:2], strict=True):
        assert torch.equal(part, wanted) and part.dtype is wanted.dtype
    for name in ARRAYS:
        assert getattr(made, name).dtype == np.int32
    for name in GROUPS:
        np.testing.assert_array_equal(getattr(made.groups, name), getattr(oracle.groups, name))
    assert (made.granules, made.group, made.max_page) == (
        oracle.granules,
        oracle.group,
        oracle.max_page,
    )


def large(seed: int, nodes: int, deepest: int) -> Forest:
    """A forest whose nodes hang anywhere below one of the last `deepest`."""
    random = np.random.default_rng(seed)
    place = np.arange(nodes)
    parents = np.maximum(-1, place - random.integers(1, deepest + 1, nodes))
    lengths = random.choice((0, 1, 1, 3, 17, 64, 500), nodes)
    rows = np.minimum(random.integers(0, 3, nodes), np.where(lengths, lengths, 2))
    return Forest.from_parents(parents, lengths, rows)


@settings(max_examples=600)
@given(cases(), profiles(), st.sampled_from(TILES), st.sampled_from(compiled.GROUPINGS))
def test_random_forests_get_the_same_plan(case, device, tiles, grouping) -> None:
    made = recipe(case.spec, tiles, device, grouping)
    plan, oracle = made(case.forest, case.pages), in_python(made)(case.forest, case.pages)
    if case.spec.window is None:
        assert_equal(plan, oracle)
    else:
        assert not in_one_buffer(plan)
        assert_same(plan, oracle)


@pytest.mark.parametrize("grouping", compiled.GROUPINGS)
@pytest.mark.parametrize("deepest", (1, 3, 40, 3000))
@pytest.mark.parametrize("kind", ("cpu", "cuda"))
def test_thousands_of_nodes(grouping: str, deepest: int, kind: str) -> None:
    for seed, nodes in enumerate((1, 2, 60, 700, 3000)):
        forest = large(seed, nodes, deepest)
        for cores in (1, 2, 132):
            made = recipe(SPEC, WIDE, msgspec.structs.replace(profile(cores), kind=kind), grouping)
            pages = PageTable.contiguous(forest)
            assert_equal(made(forest, pages), in_python(made)(forest, pages))


def test_paths_are_as_long_as_they_have_tokens() -> None:
    """Not as they have nodes: a hundred thousand without any would be five thousand million."""
    nodes = 100_000
    lengths = np.zeros(nodes, np.int32)
    lengths[[0, nodes - 1]] = 3
    forest = Forest.from_parents(np.arange(nodes) - 1, lengths, np.ones(nodes, np.int32))
    plan = recipe(SPEC, WIDE, profile(2), "sequence")(forest, PageTable.contiguous(forest))
    assert len(plan.runs) == nodes + 1 and plan.num_partials == 0


def test_more_pieces_than_can_be_counted_are_refused() -> None:
    nodes = 70_000
    ones = np.ones(nodes, np.int32)
    forest = Forest.from_parents(np.arange(nodes) - 1, ones, ones)
    with pytest.raises(MemoryError, match="no memory is left to plan in"):
        recipe(SPEC, WIDE, profile(2), "sequence")(forest, PageTable.contiguous(forest))


def test_an_update_is_that_of_the_plan_in_python() -> None:
    forest = large(7, 200, 5)
    made = recipe(SPEC, WIDE, profile())
    one, other = (each(forest, PageTable.contiguous(forest)) for each in (made, in_python(made)))
    for step in range(1, 40):
        grown = forest.with_lengths(forest.lengths + step * (forest.lengths > 0))
        pages = PageTable.contiguous(grown)
        one, other = one.update(grown, pages), other.update(grown, pages)
        assert_same(one, other)


def test_room_is_found_for_plans_of_any_size() -> None:
    made = recipe(SPEC, WIDE, profile())
    small, huge = large(1, 3, 1), large(2, 20000, 9)
    for forest in (small, huge, small, huge):
        pages = PageTable.contiguous(forest)
        plan = made(forest, pages)
        assert in_one_buffer(plan) and (plan.laid.size > 20000) == (forest is huge)
        assert_same(plan, in_python(made)(forest, pages))


def test_pages_are_checked_before_any_plan() -> None:
    """Nodes grow up to what was checked, and are looked at again beyond it."""
    made = recipe(SPEC, WIDE, profile())
    size = SPEC.page_size
    forest = Forest.from_parents([-1, 0, 0], [size + 1, 3, 2])
    pages = PageTable([5, 6, 6], [0, 2, 3, 3], [0, 1, 0], page_size=size)
    with pytest.raises(PageError, match="node 2 has 2 tokens from slot 0 on"):
        made(forest, pages)
    pages = PageTable([5, 6, 6, 7], [0, 2, 3, 4], [0, 1, 0], page_size=size)
    assert in_one_buffer(made(forest, pages))
    for lengths in ([size + 1, size - 1, size], [2, 3, 2]):
        assert in_one_buffer(made(forest.with_lengths(lengths), pages))
    with pytest.raises(PageError, match="page 6 is shared by nodes 0 and 1"):
        made(forest.with_lengths([size + 2, 3, 2]), pages)
    for other in (forest.from_parents([-1], [3]), forest.from_parents([-1] * 4, [1] * 4)):
        with pytest.raises(PageError, match="page_indptr has 4 entries"):
            made(other, pages)


def test_what_it_does_not_plan_is_planned_in_python() -> None:
    forest = large(3, 50, 4)
    pages = PageTable.contiguous(forest)
    for grouping in ("node", "node_chunk", "flatten"):
        assert not in_one_buffer(recipe(SPEC, WIDE, profile(), grouping)(forest, pages))
    assert not in_one_buffer(recipe(SPEC, WIDE, profile(), chunk=64)(forest, pages))
    assert not in_one_buffer(recipe(SPEC, WIDE, profile(), deterministic=True)(forest, pages))
    windowed = replace(plain(16), window=8)
    plan = recipe(windowed, TILES[0], profile())(forest, pages)
    assert not in_one_buffer(plan) and len(plan.row_positions) == forest.num_rows


def test_structures_are_those_of_the_header() -> None:
    header = (PLANNER[0].parent / "native.h").read_text()
    for name, struct in (
        ("Forest", compiled._FOREST),
        ("Pages", compiled._PAGES),
        ("Prices", compiled._PRICES),
    ):
        body = re.search(r"typedef struct \{ /\*[^*]*\*/([^}]*)\} " + name, header)
        assert body is not None
        assert re.findall(r"\*?(\w+)[,;]", body[1]) == [field for field, _ in struct._fields_]


def test_arrays_are_what_the_structures_say() -> None:
    forest = large(4, 30, 3)
    for name in compiled._FOREST.arrays:
        assert getattr(forest, name).dtype == np.int32 and getattr(forest, name).flags.c_contiguous
    priced = recipe(SPEC, WIDE, profile()).prices
    for name in compiled._PRICES.arrays:
        wanted = np.float64 if name.endswith("seconds") else np.int64
        assert getattr(priced, name).dtype == wanted and getattr(priced, name).flags.c_contiguous
    assert CostModel.from_profile(profile()).cores == priced.cores


def test_threads_that_meet_a_forest_at_once() -> None:
    """Each must see structures that live for as long as it plans."""
    made = recipe(SPEC, WIDE, profile())
    for seed in range(40):
        forest = large(seed, 300, 5)
        pages = PageTable.contiguous(forest)
        with ThreadPoolExecutor(4) as pool:
            plans = [*pool.map(lambda _, *given: made(*given), range(4), [forest] * 4, [pages] * 4)]
        for plan in plans[1:]:
            assert_same(plan, plans[0])

"""Plans: every visible (row, token) pair exactly once by every grouping, and the arrays."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from cases import (
    ARRAYS,
    SPEC,
    TILES,
    WIDE,
    Case,
    assert_same,
    cases,
    few_shot,
    fill_cache,
    forests,
    paged,
    plain,
    plan_of,
    profile,
    profiles,
)
from executor import execute
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.errors import PageError, PlanError
from deft_tvm.pages import PageTable
from deft_tvm.plan import GROUPINGS, Plan, make_plan
from deft_tvm.plan import packed as packed_module
from deft_tvm.spec import TileShape
from deft_tvm.tree import Forest

# float64 on both sides. Scores are sums of 4 or 8 products of about 1, outputs averages of at most
# some 360 values: errors of a few hundred times 2⁻⁵³.
CLOSE = {"rtol": 0.0, "atol": 1e-13}


def assert_exact(case: Case, plan: Plan) -> None:
    done = execute(plan, case.spec, case.q, case.buffers)
    visible = {(int(row), *case.slots[token]) for row, token in np.argwhere(case.mask())}
    counted = {pair: count for pair, count in done.pairs.items() if count}
    assert counted == dict.fromkeys(visible, 1)
    out, lse = case.exact()
    np.testing.assert_allclose(done.out, out, **CLOSE)
    np.testing.assert_allclose(done.lse, lse, **CLOSE)


@settings(max_examples=300)
@given(cases(), profiles(), st.sampled_from(TILES), st.sampled_from((None, 1, 3, 8)), st.data())
def test_every_grouping_is_exact(case, device, tiles, chunk, data) -> None:
    grouping = data.draw(st.sampled_from(GROUPINGS))
    chunk = None if grouping == "node" else chunk
    fixed = grouping not in ("flatten", "packed") and data.draw(st.booleans())
    plan = make_plan(case.forest, case.pages, case.spec, tiles, device, grouping, chunk, fixed)
    assert_exact(case, plan)


@settings(max_examples=150)
@given(cases(), profiles(), st.sampled_from(TILES), st.randoms(use_true_random=False))
def test_any_joins_and_merges_are_exact(case, device, tiles, random) -> None:
    def anyhow(clusters, _):
        return np.array([above >= 0 and random.random() < 0.6 for above in clusters.parent], bool)

    gain = random.choice((packed_module.MERGE_GAIN, -1e9))  # or merge all that may be
    with mock.patch.multiple(packed_module, hand_down=anyhow, MERGE_GAIN=gain):
        plan = make_plan(case.forest, case.pages, case.spec, tiles, device, "packed")
    assert_exact(case, plan)


@settings(max_examples=60)
@given(forests(), profiles(), st.sampled_from(GROUPINGS), st.data())
def test_update_is_a_plan_made_afresh(forest, device, grouping, data) -> None:
    number = forest.num_nodes
    more = data.draw(st.lists(st.integers(0, 20), min_size=number, max_size=number))
    grown = forest.with_lengths(np.where(forest.lengths > 0, forest.lengths + more, 0))
    before, after = (fill_cache(f, paged(f, 4, True, 1), plain(4), 1) for f in (forest, grown))
    plan = make_plan(forest, before.pages, before.spec, TILES[0], device, grouping)
    updated = plan.update(grown, after.pages)
    fresh = make_plan(grown, after.pages, after.spec, TILES[0], device, plan.grouping)
    assert_same(updated, fresh)
    assert_exact(after, updated)


def test_a_node_that_gets_its_first_tokens_gets_items() -> None:
    plan = plan_of(Forest.from_parents([-1, 0, 0], [1000, 0, 40]))
    forest = plan.forest.with_lengths([1000, 1, 40])
    updated = plan.update(forest, PageTable.contiguous(forest))
    assert_covers(updated)


def test_update_of_pages_alone_moves_the_runs() -> None:
    forest = few_shot(100, 4, 10)
    one, other = (paged(forest, 16, tight, 3) for tight in (True, False))
    plan = make_plan(forest, one, SPEC, WIDE, profile(), "node_chunk")
    updated = plan.update(forest, other)
    assert_same(updated, make_plan(forest, other, SPEC, WIDE, profile(), "node_chunk"))
    assert not np.array_equal(plan.runs, updated.runs)
    assert updated.items is plan.items


def test_growth_that_leaves_the_items_their_rows_keeps_the_partials() -> None:
    plan = plan_of(few_shot())
    grown = plan.forest.with_lengths(plan.forest.lengths + 1)
    assert plan.update(grown, PageTable.contiguous(grown)).dests is plan.dests


def test_update_refuses_another_tree() -> None:
    other = few_shot(branches=31)
    with pytest.raises(PlanError, match="parents or rows are not those of the plan"):
        plan_of(few_shot()).update(other, PageTable.contiguous(other))


def test_arrays_are_what_kernels_take() -> None:
    plan = plan_of(few_shot(), "flatten")
    for name in ARRAYS:
        array = getattr(plan, name)
        assert array.dtype == np.int32 and array.flags.c_contiguous, name
    assert plan.header.shape == (8,) and plan.runs.shape[1] == plan.items.shape[1] == 7
    assert len(plan.dests) == plan.items[:, 1].sum()
    assert plan.num_partials == (plan.dests >= 0).sum()


def test_launches_divide_the_items_dearest_first() -> None:
    lengths = [500, 100, 300, 200, 700, 900, 400, 800]
    plan = plan_of(Forest.from_parents([-1, 0, 0, 0, 1, 1, 2, 2], lengths), "node")
    assert [begin for _, begin, _ in plan.launches] == [0, *[e for *_, e in plan.launches][:-1]]
    assert plan.launches[-1][2] == plan.num_items
    for tile, begin, end in plan.launches:
        assert (plan.items[begin:end, 1] * SPEC.group <= WIDE[tile].lane_rows).all()
        assert (np.diff(plan.items[begin:end, 4]) <= 0).all()


def test_search_steps_find_any_run() -> None:
    draft = Forest.from_choices([(i,) for i in range(63)], 100)
    assert plan_of(draft).header[1] == 6  # 64 runs
    assert plan_of(few_shot(), "node").header[1] == 0


def test_partials_of_a_row_are_neighbours_in_the_order_of_the_tree() -> None:
    plan = plan_of(Forest.from_parents([-1, 0, 0], [300, 5, 6]), "node_chunk")
    assert plan.merge_rows.tolist() == [0, 1]
    assert plan.merge_indptr.tolist() == [0, 4, 8]
    begins = {tuple(item[[0, 1]]): [] for item in plan.items}
    for row_begin, num_rows, run_begin, _, _, dest_begin, _ in plan.items.tolist():
        slots = plan.dests[dest_begin : dest_begin + num_rows].tolist()
        begins[row_begin, num_rows].append((plan.runs[run_begin, 2], slots))
    assert sorted(begins[0, 2]) == [(0, [0, 4]), (128, [1, 5]), (256, [2, 6])]
    assert begins[0, 1] == [(300, [3])] and begins[1, 1] == [(305, [7])]


def test_rows_of_one_item_go_straight_to_the_output() -> None:
    plan = plan_of(Forest.from_parents([-1] * 16, [1024] * 16), "auto")
    assert plan.num_partials == 0 and len(plan.merge_rows) == 0
    assert sorted((~plan.dests).tolist()) == list(range(16))


def test_a_row_that_sees_nothing_is_merged_from_nothing() -> None:
    plan = plan_of(Forest.from_parents([-1, -1], [0, 7], [2, 1]), "auto")
    assert plan.merge_rows.tolist() == [0, 1] and plan.merge_indptr.tolist() == [0, 0, 0]
    assert (~plan.dests).tolist() == [2]


def test_no_rows_and_no_nodes_make_an_empty_plan() -> None:
    for forest in (Forest.from_parents([-1, 0], [5, 6], [0, 0]), Forest.from_parents([], [])):
        for grouping in GROUPINGS:
            plan = plan_of(forest, grouping)
            assert plan.num_items == plan.num_partials == len(plan.dests) == 0, grouping
            assert plan.launches == ()


def test_rows_beyond_the_largest_class_are_cut_in_blocks() -> None:
    plan = plan_of(few_shot(640, 100, 1), "node")
    root = plan.items[plan.items[:, 4] == 640]
    assert sorted(root[:, 1].tolist()) == [16, 28, 28, 28]


def test_blocks_leave_out_what_their_rows_do_not_see() -> None:
    # 64 rows at the end of 1,000 tokens: the first 32 see 32 tokens less.
    plan = plan_of(Forest.from_parents([-1], [1000], [64]), "node")
    assert sorted(plan.items[:, 4].tolist()) == [968, 1000]


def assert_covers(plan: Plan) -> None:
    """Rows see as many tokens in all items together as they have on their paths."""
    forest, total = plan.forest, 0
    for row_begin, num_rows, run_begin, run_end, num_tokens, *_ in plan.items.tolist():
        ends = [*plan.runs[run_begin + 1 : run_end, 0].tolist(), num_tokens]
        for run, end in zip(plan.runs[run_begin:run_end].tolist(), ends, strict=True):
            t = np.arange(end - run[0])
            first = np.maximum(run[3] + np.maximum(0, t - run[5]), row_begin)
            total += np.maximum(0, min(run[4], row_begin + num_rows) - first).sum()
    path = forest.start + forest.lengths
    own = np.where(forest.lengths > 0, forest.rows * (forest.rows - 1) // 2, 0)
    assert total == (forest.rows * path - own).sum()


@pytest.mark.parametrize("grouping", ["node", "flatten", "packed", "auto"])
def test_deep_and_wide_trees(grouping) -> None:
    chain = Forest.from_parents(np.arange(-1, 2999), np.full(3000, 2), [0, 0, 1] * 1000)
    assert_covers(plan_of(chain, grouping))
    assert_covers(plan_of(few_shot(3000, 1000, 20), grouping))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"grouping": "radix"}, "grouping is 'radix'; expected one of node, node_chunk"),
        ({"grouping": "flatten", "chunk": 0}, "chunk is 0; expected 1 or more"),
        ({"grouping": "node", "chunk": 64}, "chunk is 64, but 'node' never cuts"),
        ({"grouping": "packed", "deterministic": True}, "grouping is 'packed', whose items depend"),
        ({"tiles": ()}, r"tiles hold \[\] lane rows; expected one"),
        ({"tiles": (TileShape(2, 16, "float32"),)}, r"tiles hold \[2\] lane rows; expected one"),
    ],
)
def test_refusals(how, message) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(few_shot(), **{"grouping": "auto", **how})


def test_pages_must_fit_the_spec_and_the_forest() -> None:
    forest = few_shot(20, 2, 3)
    with pytest.raises(PlanError, match="pages have page_size 4; expected the spec's, which is 16"):
        make_plan(forest, paged(forest, 4, True, 0), SPEC, WIDE, profile())
    with pytest.raises(PageError, match="expected one more than the forest has nodes"):
        make_plan(forest, PageTable([0], [0, 1], page_size=16), SPEC, WIDE, profile())


def test_shape_of_the_text() -> None:
    assert repr(plan_of(few_shot())) == (
        "Plan(packed: 33 items (1 r128t64f32, 32 r4t64f32), 33 runs, 32 rows, 64 partials)"
    )

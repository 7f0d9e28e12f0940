"""Groupings: what becomes an item, and that the model's choice is the cheapest by the model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from cases import WIDE, assert_same, few_shot, plan_of, profile

from deft_tvm.device import DeviceProfile
from deft_tvm.plan import GROUPINGS, CostModel, Plan
from deft_tvm.plan.cost import makespan, prices
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest


def test_flatten_cuts_across_nodes_and_keeps_the_paper_s_chunk() -> None:
    plan = plan_of(few_shot(), "flatten")
    assert plan.num_items == -(-(4000 + 32 * 64) // 128)
    assert sorted(set(plan.items[:, 4].tolist())) == [32, 128]


def test_sequence_reads_each_path_for_itself() -> None:
    plan = plan_of(few_shot(900), "sequence")
    assert plan.items[:, 4].tolist() == [964] * 32 and plan.num_partials == 0


def test_an_item_that_waits_for_memory_fits_the_cache_with_all_its_heads() -> None:
    token_bytes = 2 * 8 * 128 * 4
    tokens = plan_of(Forest.from_parents([-1], [65536])).items[:, 4]
    assert tokens.sum() == 65536 and tokens.max() * token_bytes == 8 << 20
    gpu = msgspec.structs.replace(profile(), kind="cuda")
    on_gpu = plan_of(Forest.from_parents([-1], [65536]), profile=gpu)
    assert on_gpu.items[:, 4].tolist() == [65536]


def test_packed_takes_a_draft_tree_as_one_item_a_row_block() -> None:
    draft = Forest.from_choices([(i,) for i in range(31)], 1000)
    plan = plan_of(draft)
    assert plan.items[:, :2].tolist() == [[0, 32]] and plan.num_partials == 0


def test_packed_keeps_a_long_prompt_apart_from_its_branches() -> None:
    plan = plan_of(few_shot())
    assert sorted(plan.items[:, 4].tolist()) == [64] * 32 + [4000]


def test_packed_reads_a_short_prefix_again_in_every_branch() -> None:
    plan = plan_of(few_shot(16, 32, 500))
    assert plan.items[:, 4].tolist() == [516] * 32 and plan.num_partials == 0


def test_packed_lets_only_those_children_join_that_save_by_it() -> None:
    # The first child spares 30 rows a partial by reading 64 tokens again, the others one row each.
    parents = [-1, 0] + [1] * 30 + [0] * 12
    plan = plan_of(Forest.from_parents(parents, [64, 400] + [300] * 30 + [600] * 12))
    shapes = {(tokens, rows) for rows, tokens in plan.items[:, [1, 4]].tolist()}
    assert shapes == {(64 + 400, 30), (300, 1), (64, 12), (600, 1)}


def test_packed_lets_short_neighbours_share_an_item() -> None:
    plan = plan_of(few_shot(20000, 32, 5), tiles=WIDE[:2])
    assert plan.num_items < 10


def test_packed_cuts_to_fill_the_machine() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=1, head_dim=64)
    plan = plan_of(few_shot(), spec=spec, profile=profile(cores=16), tiles=WIDE[:2])
    assert plan.num_items > 16
    whole = plan_of(few_shot(), profile=profile(cores=2))
    assert whole.num_items == 33  # 8 units of the prompt keep 2 cores as busy as any cut would


def modelled_seconds(plan: Plan, spec: AttentionSpec, tiles, device) -> float:
    costs = prices(spec, tiles, CostModel.from_profile(device))
    _, seconds = costs.choose_tile(plan.items[:, 4], plan.items[:, 1])
    units = np.full(plan.num_items, spec.num_kv_heads)
    return float(makespan(seconds, units, device.cores)) + plan.num_partials * costs.partial_seconds


TREES = {
    "few_shot": few_shot(),
    "short prefix": few_shot(16, 64, 500),
    "sequences": Forest.from_parents([-1] * 16, [1024] * 16),
    "one": Forest.from_parents([-1], [65536]),
    "thoughts": Forest.from_parents([-1] + [0] * 10 + [1] * 10 + [11] * 10, [1200] + [300] * 30),
    "draft": Forest.from_choices(
        [
            (i, j, k)[:n]
            for n in (1, 2, 3)
            for i in range(4)
            for j in range(4)
            for k in range(4)
            if (n > 1 or j == 0) and (n > 2 or k == 0)
        ],
        1000,
    ),
    "system": Forest.from_parents(
        [-1] + [0 if i % 9 == 0 else 1 + i // 9 * 9 for i in range(288)],
        [32] + [700 if i % 9 == 0 else 100 for i in range(288)],
    ),
}


def test_lanes_that_an_item_leaves_of_its_class_cost_nothing_on_a_cpu() -> None:
    spec = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
    tile = (TileShape(64, 64, "float32"),)
    cpu = msgspec.structs.replace(profile(), read_bandwidth=1e15)
    gpu = msgspec.structs.replace(cpu, kind="cuda")
    tokens = np.array([10**6])

    def seconds(rows: int, device: DeviceProfile) -> float:
        costs = prices(spec, tile, CostModel.from_profile(device))
        return float(costs.choose_tile(tokens, np.array([rows]))[1][0])

    lane_rows = [4 * rows for rows in range(1, 17)]
    products = [seconds(rows, cpu) - seconds(0, cpu) for rows in range(1, 17)]
    assert np.allclose(products, [products[-1] * -(-lanes // 16) / 4 for lanes in lane_rows])
    assert len({seconds(rows, gpu) for rows in range(1, 17)}) == 1


def test_every_tile_class_keeps_all_cores_busy_to_its_end() -> None:
    # Ten rows are more than a class of 128 lane rows holds of 16 query heads: the prompt falls into
    # a few items of one class, and the answers into many of another.
    spec = AttentionSpec.mla(
        num_q_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128
    )
    tiles = default_tiles(spec, "llvm", frozenset(profile(cores=2).features))
    plan = plan_of(few_shot(1500, 10, 300), "packed", spec, profile=profile(cores=2), tiles=tiles)
    costs = prices(spec, tiles, CostModel.from_profile(profile(cores=2)))
    assert len(plan.launches) > 1
    for _, begin, end in plan.launches:
        items = plan.items[begin:end]
        _, seconds = costs.choose_tile(items[:, 4], items[:, 1])
        ends = makespan(seconds, np.ones(len(items), int), 2)
        assert ends <= 1.1 * seconds.sum() / 2


def test_makespan_counts_waves_and_load() -> None:
    seconds, units = np.array([3.0, 1.0]), np.array([5, 4])
    assert makespan(seconds, units, cores=4) == 6.0  # a core takes two of the five long ones
    assert makespan(seconds, units, cores=5) == 19 / 5
    assert makespan(seconds, units, cores=100) == 3.0
    assert makespan(seconds[:0], units[:0], cores=2) == 0.0


@pytest.mark.parametrize("cores", [2, 64])
@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (16, 1)])
@pytest.mark.parametrize("name", TREES)
def test_auto_is_as_cheap_by_the_model_as_any_grouping(name, heads, cores) -> None:
    spec = AttentionSpec.gqa(num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=128)
    tiles = (*WIDE, TileShape(16, 32, "float32"))
    device = profile(cores, 1e10 * cores, 1e11 * cores)

    def seconds(grouping: str) -> float:
        plan = plan_of(TREES[name], grouping, spec, tiles=tiles, profile=device)
        return modelled_seconds(plan, spec, tiles, device)

    # 1.1: packing compares modelled parts and not whole plans.
    assert seconds("auto") <= 1.1 * min(map(seconds, GROUPINGS))


@pytest.mark.parametrize("grouping", ["auto", "node", "node_chunk", "sequence"])
def test_deterministic_plans_ignore_the_device_and_other_trees(grouping) -> None:
    tree, other = few_shot(1300, 5, 70), few_shot(900, 60, 3)
    how = {"grouping": grouping, "deterministic": True}
    alone = plan_of(tree, **how)
    assert_same(alone, plan_of(tree, profile=profile(64, 1e12, 1e15), **how))
    both = Forest.from_parents(
        np.append(tree.parents, np.where(other.parents < 0, -1, other.parents + tree.num_nodes)),
        np.append(tree.lengths, other.lengths),
    )
    assert _stories(alone, 5) == _stories(plan_of(both, **how), 5)


def _stories(plan: Plan, rows: int) -> list[list[tuple]]:
    """For each of the first rows: the items it is in, in the order of its merge, without numbers
    that only say where in the arrays something lies."""
    stories = [[] for _ in range(rows)]
    for tile, begin, end in plan.launches:
        for row_begin, num_rows, run_begin, run_end, tokens, dest, _ in plan.items[
            begin:end
        ].tolist():
            runs = plan.runs[run_begin:run_end, [0, 2, 5]].tolist()
            for within in range(num_rows):
                if row_begin + within < rows:
                    slot = int(plan.dests[dest + within])
                    stories[row_begin + within].append((slot, tile, tokens, runs))
    return [[rest for _, *rest in sorted(story)] for story in stories]


def test_deterministic_items_take_the_smallest_class_that_holds_them() -> None:
    plan = plan_of(few_shot(100, 8, 9), "auto", deterministic=True)
    assert plan.grouping == "node_chunk"
    assert [tile for tile, *_ in plan.launches] == [1, 2]


def test_past_the_ridge_a_prefix_is_read_again_and_before_it_shared() -> None:
    """128 heads of MLA fill a tile with one row: sharing KV saves no product, and a partial weighs
    456 tokens. GQA's weighs 8, and its rows share a tile."""
    forest = few_shot(256, 8, 64)
    logs = Path(__file__).parents[1] / "logs"
    shipped = DeviceProfile.read(logs / "amd-epyc-avx512bf16-2c" / "device.json")
    gqa = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    mla = AttentionSpec.mla(
        num_q_heads=128,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        dtype="bfloat16",
    )
    plans = {}
    for name, spec in (("gqa", gqa), ("mla", mla)):
        tiles = default_tiles(spec, "llvm", frozenset(shipped.features))
        plans[name] = plan_of(forest, "auto", spec, tiles=tiles, profile=shipped)
    assert 256 in plans["gqa"].items[:, 4] and plans["gqa"].num_partials == 16
    assert plans["mla"].items[:, 4].tolist() == [320] * 8 and plans["mla"].num_partials == 0

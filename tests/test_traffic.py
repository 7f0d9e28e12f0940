"""Traffic: what is counted from the arrays is what a plan run by hand reads."""

from __future__ import annotations

import pytest
from cases import TILES, cases, profile, profiles
from executor import execute
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.pages import PageTable
from deft_tvm.plan import GROUPINGS, Traffic, make_plan, traffic
from deft_tvm.plan.traffic import row_tokens
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.tree import Forest

SPEC = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
FEW_SHOT = Forest.from_parents([-1] + [0] * 32, [4000] + [64] * 32)


def traffic_of(forest: Forest, grouping: str = "node", spec: AttentionSpec = SPEC) -> Traffic:
    tiles = (TileShape(128, 64, "float32"),)
    pages = PageTable.contiguous(forest)
    return traffic(make_plan(forest, pages, spec, tiles, profile(), grouping), spec)


def element_bytes(spec: AttentionSpec) -> dict[str, int]:
    """Of each kind of traffic: each cache has its own type, partials are float32."""
    kinds = {"k": spec.k.buffer, "v": spec.v.buffer, "rope": spec.rope or 0}
    types = {kind: spec.buffers[number].dtype for kind, number in kinds.items()}
    types |= {"q": spec.dtype, "output": spec.dtype}
    sizes = {kind: 4 if dtype == "float32" else 2 for kind, dtype in types.items()}
    return sizes | {"partials": 4, "indices": 4}


@settings(max_examples=100)
@given(cases(), profiles(), st.sampled_from(TILES), st.sampled_from(GROUPINGS))
def test_counts_are_what_an_execution_reads(case, device, tiles, grouping) -> None:
    plan = make_plan(case.forest, case.pages, case.spec, tiles, device, grouping)
    reads = execute(plan, case.spec, case.q, case.buffers).reads
    counted = traffic(plan, case.spec)
    sizes = element_bytes(case.spec)
    for kind in ("k", "v", "rope", "q", "partials", "indices"):
        assert getattr(counted.tree, kind) == sizes[kind] * reads[kind], kind
    lse = plan.num_rows * case.spec.num_q_heads
    assert counted.tree.output == sizes["output"] * reads["output"] + 4 * lse
    assert counted.flops == reads["flops"]
    assert counted.tile_flops == reads["tile_flops"] >= reads["flops"]


@settings(max_examples=50)
@given(cases())
def test_sequence_based_decoding_reads_what_each_row_sees(case) -> None:
    tiles, seen = TILES[0], int(case.mask().sum())
    plan = make_plan(case.forest, case.pages, case.spec, tiles, profile(), "node")
    counted, spec, sizes = traffic(plan, case.spec).sequence, case.spec, element_bytes(case.spec)
    assert counted.k == (0 if spec.tied else seen * 2 * 4 * sizes["k"])  # KV heads, width, bytes
    assert counted.v == seen * 2 * spec.v_width * sizes["v"]
    assert counted.rope == seen * spec.rope_width * sizes["rope"]  # one head for both
    assert counted.q == case.q.size * sizes["q"]
    assert counted.partials == 0


def test_few_shot_by_hand() -> None:
    counted = traffic_of(FEW_SHOT)
    token = 8 * 128 * 2
    assert counted.tree.k == counted.tree.v == (4000 + 32 * 64) * token
    assert counted.sequence.k == 32 * 4064 * token
    assert counted.kv_saved_percent == pytest.approx(100 * (1 - 6048 / 130048))
    assert counted.tree.q == 2 * 32 * 32 * 128 * 2  # every row is in two items
    assert counted.tree.partials == 2 * 64 * 32 * 129 * 4  # written and read
    assert counted.tree.output == counted.sequence.output == 32 * 32 * (128 * 2 + 4)
    assert counted.flops == 2 * 256 * 32 * 32 * 4064


def test_sequence_grouping_saves_nothing() -> None:
    counted = traffic_of(FEW_SHOT, "sequence")
    assert counted.kv_saved_percent == 0
    assert counted.tree.kv == counted.sequence.kv


def test_a_tied_state_is_read_once_and_so_is_a_rope_that_heads_share() -> None:
    spec = AttentionSpec(
        num_q_heads=4,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 16, "float32"), CacheBuffer("rope", 1, 8, "bfloat16")),
        k=Region(0, 0, 8),
        v=Region(0, 0, 16),
        scale=1.0,
        rope=1,
    )
    counted = traffic_of(Forest.from_parents([-1], [10]), spec=spec).tree
    assert (counted.k, counted.v, counted.rope) == (0, 10 * 2 * 16 * 4, 10 * 8 * 2)


def test_gta_reads_about_half_of_gqa() -> None:
    """arXiv 2505.21487, table 26: 8.5 to 16 of the head width for 8 KV heads."""
    forest = Forest.from_parents([-1], [65536])
    heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    gta, gqa = AttentionSpec.gta(**heads, rope_dim=64), AttentionSpec.gqa(**heads)
    read = [traffic_of(forest, spec=spec).tree.kv for spec in (gta, gqa)]
    assert read[0] / read[1] == 8.5 / 16


def test_a_forest_without_rows_moves_nothing() -> None:
    counted = traffic_of(Forest.from_parents([-1], [10], [0]))
    assert counted.tree.kv == counted.sequence.total == counted.flops == 0
    assert counted.kv_saved_percent == 0
    assert str(counted).endswith("GFLOP: 0.000, 100% of what the tiles compute")


def test_tokens_in_a_window_are_those_of_each_row_in_the_callers_order() -> None:
    """The first node is the leaf, so that its rows come last in depth-first order."""
    forest = Forest.from_parents([1, -1, 1], [3, 5, 0], [2, 1, 1])
    assert forest.row_order.tolist() == [2, 0, 1, 3]
    assert row_tokens(forest, None).tolist() == [7, 8, 5, 5]
    assert row_tokens(forest, 6).tolist() == [6, 6, 5, 5]
    assert row_tokens(forest, 2).tolist() == [2, 2, 2, 2]
    bidirectional = Forest.from_parents([1, -1], [3, 5], [2, 1], [True, False])
    assert row_tokens(bidirectional, None).tolist() == [8, 8, 5]
    assert row_tokens(bidirectional, 4).tolist() == [5, 4, 4], "later tokens of the node, too"


def test_table() -> None:
    assert str(traffic_of(FEW_SHOT)).splitlines() == [
        "MiB               plan   by sequence",
        "k               11.812       254.000",
        "v               11.812       254.000",
        "rope             0.000         0.000",
        "q                0.500         0.250",
        "partials         2.016         0.000",
        "output           0.254         0.254",
        "indices          0.019         0.001",
        "total           26.414       508.505",
        "KV bytes saved: 95.3 %",
        "GFLOP: 2.131, 98% of what the tiles compute",
    ]

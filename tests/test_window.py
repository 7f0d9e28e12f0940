"""Sliding windows: which rows see what, that no more is read, and that others pay nothing."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from cases import plan_of
from compiled import few_and_many, worst
from hypothesis import given
from hypothesis import strategies as st

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import PlanError, SpecError
from deft_tvm.plan.split import interval_minima
from deft_tvm.pytorch import TreeAttention
from deft_tvm.pytorch.checks import check_plan
from deft_tvm.reference import dense_mask
from deft_tvm.schedules import schedule
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse, tensors

HERE = DeviceProfile.detect()
FULL = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
SPECS = {
    "float32": FULL,
    "bfloat16-hnd": AttentionSpec.gqa(
        num_q_heads=16, num_kv_heads=2, head_dim=64, dtype="bfloat16", layout="HND"
    ),
    "mla": AttentionSpec.mla(
        num_q_heads=8, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16
    ),
}
FORESTS = (
    "few_shot:prompt=300,branches=9,tokens=20,vary=15",
    "speculative:nodes=26,context=90",
    "sequences:count=3,tokens=200",
)


def windowed(spec: AttentionSpec, window: int) -> AttentionSpec:
    return dataclasses.replace(spec, window=window)


@pytest.mark.parametrize("window", [1, 17, 130])
@pytest.mark.parametrize("name", SPECS)
def test_kernels_are_exact(name: str, window: int) -> None:
    spec = windowed(SPECS[name], window)
    kernels = few_and_many(spec)
    for forest in FORESTS:
        case = tensors(parse(forest).forest, spec)
        for grouping in ("auto", "flatten", "node_chunk", "sequence"):
            assert worst(kernels, case, grouping) <= 1, (forest, grouping)


def test_rows_inside_a_node_and_without_kv_have_windows_of_their_own() -> None:
    spec = windowed(FULL, 5)
    kernels = few_and_many(spec)
    forest = Forest.from_parents(
        [-1, 0, 0, 1, 2], [9, 12, 3, 0, 7], [0, 8, 2, 2, 7], [False, True, False, False, True]
    )
    assert worst(kernels, tensors(forest, spec)) <= 1


def test_a_window_cuts_the_interval_by_depth() -> None:
    """A root of six tokens, all rows, with two branches of three: the third-last root token is seen
    by root rows and by what is less than three positions below it."""
    mask = dense_mask([-1, 0, 0], [6, 3, 3], [6, 3, 3], window=3)
    assert mask[:, 3].nonzero().flatten().tolist() == [3, 4, 5]
    assert mask[:, 5].nonzero().flatten().tolist() == [5, 6, 7, 9, 10]


def test_what_no_row_sees_is_not_read() -> None:
    forest = Forest.from_parents([-1, 0, 0], [16_000, 64, 64])
    for grouping in ("auto", "node", "node_chunk", "flatten", "sequence", "packed"):
        plan = plan_of(forest, grouping, windowed(FULL, 128))
        read = int(plan.items[:, 4].sum())
        assert read == (2 * 128 if grouping == "sequence" else 64 + 128) or (
            grouping in ("auto", "packed") and read <= 256
        ), grouping


def test_layers_with_and_without_a_window_share_the_forest_and_its_topology() -> None:
    forest = parse("few_shot:prompt=300,branches=5,tokens=9").forest
    full, local = plan_of(forest, "auto", FULL), plan_of(forest, "auto", windowed(FULL, 16))
    assert full.forest is local.forest is forest
    assert len(full.row_positions) == 0 and not full.items[:, 6].any()
    assert local.items[:, 4].sum() < full.items[:, 4].sum()


def test_a_plan_for_another_window_is_refused() -> None:
    forest = parse("sequences:count=2,tokens=40").forest
    plan = plan_of(forest, "auto", windowed(FULL, 16))
    with pytest.raises(PlanError, match="plan has window 16; expected the spec's, None"):
        check_plan(FULL, plan.tiles, plan)
    with pytest.raises(SpecError, match="window is 0; expected 1 or more tokens, or None"):
        windowed(FULL, 0)


def test_no_window_costs_nothing() -> None:
    """Without one no kernel reads a position."""
    tile = TileShape(32, 64, "float32")
    plain, local = (
        str(schedule(tasks_for(spec, HERE, [tile])[0])[0].mod)
        for spec in (FULL, windowed(FULL, 16))
    )
    read = re.compile(r"row_positions\[|position\[")
    assert read.search(local) and not read.search(plain)


def test_an_update_moves_the_window(tmp_path) -> None:
    spec = windowed(AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=32), 12)
    attention = TreeAttention(spec)
    parents, rows = [-1, 0, 0], [0, 1, 1]
    for lengths in ([30, 4, 5], [30, 5, 6], [30, 9, 20]):
        case = tensors(Forest.from_parents(parents, lengths, rows), spec)
        if lengths[1] == 4:
            attention.plan(case.forest, case.pages)
        else:
            attention.update(case.forest, case.pages)
        out, _ = attention.run(case.q, case.buffers)
        exact = case.reference()
        assert (out.double() - exact.out).abs().max() <= exact.bound().out
    assert torch.equal(
        torch.tensor(attention.last_plan.row_positions), torch.tensor([38, 49], dtype=torch.int32)
    )


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.data())
def test_interval_minima(values, data) -> None:
    array = np.array(values, np.int32)
    begin = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=9))
    end = [data.draw(st.integers(b + 1, len(values))) for b in begin]
    found = interval_minima(array, np.array(begin), np.array(end))
    assert found.tolist() == [min(values[b:e]) for b, e in zip(begin, end, strict=True)]

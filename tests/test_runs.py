"""Runs beside, after and under the eyes of others: threads, memory, foreign plans, watching."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from built import SMALL, artifact
from torch import Tensor

from deft_tvm import env
from deft_tvm.check import bound_of, largest_error
from deft_tvm.errors import DeftError, ExactnessError, InputError, PlanError
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, make_plan
from deft_tvm.pytorch import TreeAttention
from deft_tvm.pytorch.watch import Asked, Watch
from deft_tvm.pytorch.workspace import workspace
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors

Pair = tuple[Tensor, Tensor]
Change = Callable[[Tensor], Tensor]


@pytest.fixture
def small() -> TreeAttention:
    return TreeAttention(SMALL, artifact(SMALL))


def run(attention: TreeAttention, case: Case) -> Pair:
    attention.plan(case.forest, case.pages)
    return attention.run(case.q, case.buffers)


def same(one: Pair, other: Pair) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_threads_at_once(small: TreeAttention) -> None:
    """Each with its own plan of one module, so that workspaces and plans could be mixed up."""
    many = parse("few_shot:prompt=300,branches=16,tokens=12").forest
    cases = [tensors(many, SMALL, seed) for seed in range(2)]
    attentions = [TreeAttention(SMALL, artifact(SMALL), grouping="node_chunk") for _ in cases]
    expected = [run(one, case) for one, case in zip(attentions, cases, strict=True)]
    start = threading.Barrier(2)

    def repeat(index: int) -> bool:
        start.wait()
        case = cases[index]
        runs = (attentions[index].run(case.q, case.buffers) for _ in range(200))
        return all(same(found, expected[index]) for found in runs)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


def refused(error: type[DeftError], sentence: str) -> Any:
    return pytest.raises(error, match=re.escape(sentence))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow(small: TreeAttention) -> None:
    forest = parse("few_shot:prompt=300,branches=16,tokens=12").forest
    case = tensors(forest, SMALL)

    def steps(count: int) -> None:
        for _ in range(count):
            small.plan(forest, case.pages)
            small.run(case.q, case.buffers)

    steps(200)
    gc.collect()
    before = resident_bytes()
    steps(1000)
    gc.collect()
    # A call that kept one output, of 4 KiB, or its plan would add 4 MiB; an allocator that has
    # settled adds little.
    assert resident_bytes() - before < 2 * 2**20


def test_traffic_and_last_plan(small: TreeAttention) -> None:
    assert small.last_plan is None
    small.grouping = "node"
    plan = small.plan(Forest.from_parents([-1, 0, 0], [400, 4, 4]))
    assert small.last_plan is plan and plan.num_rows == 2
    assert small.traffic.kv_saved_percent == pytest.approx(100 * (1 - 408 / 808))
    assert "2 rows" in repr(small) and "gqa:hq=4" in repr(small)


def test_a_plan_serves_a_second_spec_with_the_same_group_and_tiles(small: TreeAttention) -> None:
    spec = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=8, page_size=4, scale=0.5)
    other = TreeAttention(spec, artifact(spec))
    case = tensors(parse("few_shot:prompt=30,branches=3,tokens=5").forest, spec)
    plan = other.use(small.plan(case.forest, case.pages))
    out, lse = other.run(case.q, case.buffers)
    exact = case.reference()
    bound = bound_of(plan, exact, spec.dtype)
    assert largest_error(out, exact.out) <= bound.out
    assert largest_error(lse, exact.lse) <= bound.lse


def test_a_plan_for_another_group_or_page_size(small: TreeAttention) -> None:
    """Kernels would write beside an item's rows, or read beside a page."""
    forest = Forest.from_parents([-1, 0, 0], [9, 3, 2])
    pages = PageTable([0, 1, 2, 3, 4], [0, 3, 4, 5], page_size=4)
    large = PageTable([0, 1, 2, 3], [0, 2, 3, 4], page_size=8)

    def plan(num_q_heads: int, pages: PageTable) -> Plan:
        size = pages.page_size
        spec = AttentionSpec.gqa(
            num_q_heads=num_q_heads, num_kv_heads=2, head_dim=16, page_size=size
        )
        return make_plan(forest, pages, spec, small.artifact.tiles, small.profile)

    with refused(PlanError, "plan has group 1; expected the spec's, 2"):
        small.use(plan(2, pages))
    with refused(PlanError, "plan has page_size 8; expected the spec's, 4"):
        small.use(plan(4, large))
    assert small.last_plan is None


# By a plan of one node with nine tokens: three pages, one row, run and item, which needs no merge.
PACKED: dict[str, tuple[Change, Change, str]] = {
    "plan dtype": (Tensor.long, Tensor.clone, "plan is int64[28]; expected int32[28]"),
    "plan size": (lambda plan: plan[:-1], Tensor.clone, "plan is int32[27]; expected int32[28]"),
    "plan shape": (lambda plan: plan[None], Tensor.clone, "plan is int32[1, 28]; expected int32[2"),
    "plan strides": (
        lambda plan: plan.repeat_interleave(2)[::2],
        Tensor.clone,
        "plan has strides (2,); expected it contiguous",
    ),
    "layout dtype": (Tensor.clone, Tensor.int, "layout is int32[11]; expected int64[N]"),
    "layout shape": (Tensor.clone, lambda one: one[None], "layout is int64[1, 11]; expected int64"),
    "layout size": (
        Tensor.clone,
        lambda one: one[:8],
        "expected 11 numbers, none below ze",
    ),
    "layout that goes on": (
        Tensor.clone,
        lambda one: torch.cat([one, one.new_zeros(1)]),
        "expected 11 numbers, none below zero",
    ),
    "layout strides": (
        Tensor.clone,
        lambda one: one.repeat_interleave(2)[::2],
        "layout is on cpu with strides (2,); expected it contiguous on the CPU",
    ),
    "layout below zero": (Tensor.clone, Tensor.neg, "expected 11 numbers, none below zero"),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_plan_that_was_changed(small: TreeAttention, name: str) -> None:
    case = tensors(Forest.from_parents([-1], [9]), SMALL)
    small.plan(case.forest, case.pages)
    change_plan, change_layout, sentence = PACKED[name]
    plan, layout, key = small.operands
    given = change_plan(plan.clone()), change_layout(layout)
    with refused(InputError, sentence):
        torch.ops.deft_tvm.tree_attention(case.q, list(case.buffers), *given, key)


def test_check_and_debug_watch_each_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.CHECK.name, "1")
    monkeypatch.setenv(env.DEBUG.name, "2")
    small = TreeAttention(SMALL, artifact(SMALL))
    case = tensors(parse("few_shot:prompt=30,branches=3,tokens=5").forest, SMALL)
    expected = case.reference()
    out, _ = run(small, case)
    assert (out - expected.out).abs().max() <= expected.bound().out
    printed = capsys.readouterr().err
    assert "deft_tvm: Plan(" in printed and "KV bytes saved" in printed and " GB/s" in printed
    first = case.pages.page_indices[case.pages.page_indptr[0]]
    for buffer in case.buffers:
        buffer[first] = torch.nan
    with pytest.raises(ExactnessError, match=r"out is .* from the oracle's; expected at most"):
        small.run(case.q, case.buffers)


@pytest.mark.parametrize(("variables", "asked"), [
    ({}, None),
    ({env.DEBUG.name: "1"}, None),
    ({env.DEBUG.name: "2"}, Asked(check=False, timed=True, told=True)),
    ({env.CHECK.name: "1"}, Asked(check=True, timed=False, told=False)),
    ({env.DUMP.name: "."}, Asked(check=False, timed=False, told=True)),
])  # fmt: skip
def test_what_the_environment_asks_of_each_run(
    small: TreeAttention,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    asked: Asked | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Asked.now() == asked
    if asked is None:
        return
    case = tensors(parse("sequences:count=2,tokens=9").forest, SMALL)
    out, lse = run(small, case)
    watch = asked.watch(SMALL, small.last_plan)
    assert (watch is None) == (not asked.check and not asked.timed)
    # A hundredth is far beyond what rounding explains.
    for name, wrong in (("out", (out + 0.01, lse)), ("lse", (out, lse + 0.01))):
        if asked.check:
            with pytest.raises(ExactnessError, match=f"^{name} is .* from the oracle's; expected"):
                watch.run(lambda given=wrong: given, case.q, case.buffers)
        elif watch is not None:
            assert watch.run(lambda given=wrong: given, case.q, case.buffers) is not None


def test_a_run_is_told_with_its_bytes_and_its_time(
    small: TreeAttention, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.DEBUG.name, "2")
    case = tensors(parse("few_shot:prompt=30,branches=3,tokens=5").forest, SMALL)
    found = run(small, case)
    watch = Watch(SMALL, small.last_plan, Asked(check=False, timed=True, told=True))
    clock = SimpleNamespace(perf_counter=iter([0.0, 2e-6]).__next__)
    monkeypatch.setattr("deft_tvm.pytorch.watch.time", clock)
    watch.run(lambda: found, case.q, case.buffers)
    moved = small.traffic.tree.total
    told = f"{small.last_plan.num_items} items, {moved} bytes, 2.0 µs, {moved / 2e3:.2f} GB/s"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_update_takes_no_pages_of_another_size(deterministic: bool) -> None:
    forest = Forest.from_parents([-1, 0], [9, 3])
    attention = TreeAttention(SMALL, artifact(SMALL), deterministic=deterministic)
    attention.plan(forest, [0, 1, 2, 3], [0, 3, 4])
    with refused(PlanError, "pages have page_size 16; expected the spec's, which is 4"):
        attention.update(page_indices=PageTable([1, 2], [0, 1, 2], page_size=16))


def test_outputs_that_are_given_have_another_version_after_a_run(small: TreeAttention) -> None:
    """So that autograd refuses to go back through what was there."""
    case = tensors(parse("sequences:count=2,tokens=9").forest, SMALL)
    out, lse = run(small, case)
    weight = torch.ones(out.shape, requires_grad=True)
    (weight * out).sum().backward()
    loss = (weight * out).sum()
    small.run(case.q, case.buffers, out, lse)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = out._version, lse._version
    small.run(case.q, case.buffers, out, lse)
    assert out._version > before[0] and lse._version > before[1]


def test_outputs_of_inference_mode_have_no_version(small: TreeAttention) -> None:
    case = tensors(parse("sequences:count=2,tokens=9").forest, SMALL)
    wanted = run(small, case)
    with torch.inference_mode():
        given = [torch.full_like(tensor, torch.nan) for tensor in wanted]
        small.run(case.q, case.buffers, *given)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_more_partials_than_stage_2_can_count_are_refused() -> None:
    with refused(PlanError, "the plan has 40000 partials of 128 heads and 512 columns; expected"):
        workspace(torch.empty(0), 40000, 128, 512)


def test_room_is_kept_by_heads_and_width() -> None:
    given = torch.empty(0)
    room, lse = workspace(given, 5, 7, 11)
    assert room.shape == (8, 7, 11) and lse.shape == (8, 7)
    for slots in (1, 5, 8):
        assert workspace(given, slots, 7, 11)[0] is room
    assert workspace(given, 5, 11, 7)[0].shape == (8, 11, 7)
    assert workspace(given, 16, 7, 11)[0].shape == (16, 7, 11)


def test_room_that_is_kept_holds_no_more_partials_than_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deft_tvm.pytorch.workspace.MOST_ELEMENTS", 100 * 6)
    kept, _ = workspace(torch.empty(0), 70, 2, 3)
    assert kept.shape[0] == 100
    with refused(PlanError, "the plan has 101 partials of 2 heads and 3 columns; expected"):
        workspace(torch.empty(0), 101, 2, 3)

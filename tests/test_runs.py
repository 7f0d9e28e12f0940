"""Runs beside, after and under the eyes of others: threads, memory, shared plans, observation."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from built import SMALL, artifact

import deft_tvm
from deft_tvm import env
from deft_tvm.errors import ExactnessError
from deft_tvm.pytorch import TreeAttention
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors

Pair = tuple[torch.Tensor, torch.Tensor]


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


def test_a_plan_serves_a_second_spec_with_the_same_tiles(small: TreeAttention) -> None:
    case = tensors(parse("few_shot:prompt=30,branches=3,tokens=5").forest, SMALL)
    expected = run(small, case)
    other = deft_tvm.load(artifact(SMALL))
    assert small.last_plan is not None
    other.use(small.last_plan, case.pages)
    assert same(other.run(case.q, case.buffers), expected)


def test_check_and_debug_watch_each_run(
    small: TreeAttention, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.CHECK.name, "1")
    monkeypatch.setenv(env.DEBUG.name, "2")
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

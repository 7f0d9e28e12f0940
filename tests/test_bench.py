"""Benchmarks compare like with like: every peer computes the same attention."""

from __future__ import annotations

import pytest
import torch
from small import FEW_SHOT, SPEC, attention

from deft_tvm import bench
from deft_tvm.check import check
from deft_tvm.errors import InputError
from deft_tvm.peers import QUICK, peer
from deft_tvm.workloads import parse, tensors


def test_measurement_has_every_call_and_counts_its_traffic() -> None:
    case, attn = tensors(parse(FEW_SHOT).forest, SPEC), attention()
    found = bench.measure(FEW_SHOT, case, attn, budget=0.01)
    assert list(found.timings) == [bench.OURS, *QUICK]
    assert all(min(t.seconds) > 0 for t in found.timings.values())
    assert set(found.speedups()) == set(QUICK)
    assert found.traffic == attn.traffic
    assert found.left_out == {}


def test_step_writes_what_run_returns() -> None:
    case, attn = tensors(parse(FEW_SHOT).forest, SPEC), attention()
    assert check(case, attn).holds
    rounds = bench.between_matmuls(case, attn, budget=0.01)
    assert set(rounds.alone) == set(rounds.between) == {"projection", bench.OURS, "output"}
    assert rounds.slowdown(bench.OURS) > 0


def test_a_wrong_answer_is_an_error_beyond_its_bound() -> None:
    case, attn = tensors(parse(FEW_SHOT).forest, SPEC), attention()
    run = attn.run
    attn.run = lambda *given, **named: tuple(x + 1e-3 for x in run(*given, **named))  # type: ignore
    assert not check(case, attn).holds
    attn.run = lambda *given, **named: tuple(x * torch.nan for x in run(*given, **named))  # type: ignore
    assert check(case, attn).out_error == float("inf")


def test_copies_that_would_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MOST_COPIED", 1 << 18)
    case = tensors(parse(FEW_SHOT).forest, SPEC)
    found = bench.measure(FEW_SHOT, case, attention(), ["masked", "folded"], budget=0.01)
    assert list(found.timings) == [bench.OURS, "masked"]
    assert list(found.left_out) == ["folded"]


def test_unknown_peer() -> None:
    case = tensors(parse(FEW_SHOT).forest, SPEC)
    with pytest.raises(InputError, match=r"peer is 'flash'; expected one of sequences, folded"):
        bench.measure(FEW_SHOT, case, attention(), ["flash"])

"""Attention sinks, against a softmax that has one more column and no value for it."""

from __future__ import annotations

import math

import pytest
import torch
from built import SMALL, artifact
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.pytorch import TreeAttention, TreeAttentionModule, apply_sinks
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, tensors

FOREST = Forest.from_parents([-1, 0, 0, -1], [40, 9, 70, 0], [0, 2, 1, 1])
HEADS = SMALL.num_q_heads


@pytest.fixture
def step() -> tuple[TreeAttention, Case]:
    attention, case = TreeAttention(SMALL, artifact(SMALL)), tensors(FOREST, SMALL)
    attention.plan(case.forest, case.pages)
    return attention, case


def with_sinks(case: Case, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """From the definition: weights exp(l_j) / (Σ exp(l_j) + exp(sink)), in float64."""
    exact = case.reference()
    total = exact.lse.exp() + sinks.double().exp()
    return exact.out * (exact.lse.exp() / total)[..., None], total.log()


def test_a_sink_takes_its_share(step: tuple[TreeAttention, Case]) -> None:
    attention, case = step
    sinks = torch.linspace(-4, 9, HEADS)
    out, lse = attention.run(case.q, case.buffers, sinks=sinks)
    exact_out, exact_lse = with_sinks(case, sinks)
    bound = case.reference().bound()
    # The weight of what is no sink has an error of lse's, and is multiplied in one rounding.
    assert (out - exact_out).abs().max() <= bound.out + bound.lse * case.reference().max_value
    assert (lse - exact_lse).abs().max() <= 2 * bound.lse


def test_a_row_that_sees_nothing_sees_the_sink(step: tuple[TreeAttention, Case]) -> None:
    attention, case = step
    sinks = torch.arange(HEADS, dtype=torch.float32)
    out, lse = attention.run(case.q, case.buffers, sinks=sinks)
    assert not out[-1].any() and torch.equal(lse[-1], sinks)


def test_no_sink_changes_nothing(step: tuple[TreeAttention, Case]) -> None:
    attention, case = step
    out, lse = attention.run(case.q, case.buffers)
    none = torch.full((HEADS,), -math.inf)
    same_out, same_lse = attention.run(case.q, case.buffers, sinks=none)
    assert torch.equal(out, same_out) and torch.equal(lse, same_lse)


def test_a_huge_sink_leaves_nothing(step: tuple[TreeAttention, Case]) -> None:
    attention, case = step
    out, lse = attention.run(case.q, case.buffers, sinks=torch.full((HEADS,), 1e4))
    assert not out.any() and torch.equal(lse, torch.full_like(lse, 1e4))


def test_given_outputs_are_written_and_a_compiled_layer_agrees(
    step: tuple[TreeAttention, Case],
) -> None:
    attention, case = step
    sinks = torch.linspace(-1, 3, HEADS)
    wanted = attention.run(case.q, case.buffers, sinks=sinks)
    out, lse = (torch.full_like(tensor, torch.nan) for tensor in wanted)
    found = attention.run(case.q, case.buffers, out, lse, sinks=sinks)
    assert found[0] is out and found[1] is lse
    torch.testing.assert_close((out, lse), wanted, rtol=0, atol=0)
    layer = torch.compile(TreeAttentionModule(attention), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(layer(case.q, case.buffers, sinks), wanted, rtol=1e-6, atol=1e-6)


def test_sinks_that_are_not_one_a_head() -> None:
    out, lse = torch.zeros(3, 4, 8), torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"sinks has shape \[5\] on cpu; expected one logit for"):
        apply_sinks(out, lse, torch.zeros(5))

"""Attention sinks, against a softmax that has one more column and no value for it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from built import SMALL, artifact
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.kernels.merge import merge_partials
from deft_tvm.kernels.partial import partial_attention
from deft_tvm.pytorch import TreeAttention, TreeAttentionModule, apply_sinks
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, tensors

FOREST = Forest.from_parents([-1, 0, 0, -1], [40, 9, 70, 0], [0, 2, 1, 1])
HEADS = SMALL.num_q_heads
TILE = TileShape(16, 16, "float32")
SPEC = replace(SMALL, sinks=True)


def planned(spec: AttentionSpec, grouping: str = "node") -> tuple[TreeAttention, Case]:
    attention = TreeAttention(spec, artifact(spec), grouping=grouping)
    case = tensors(FOREST, SMALL)
    attention.plan(case.forest, case.pages)
    return attention, case


def with_sinks(case: Case, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """From the definition: weights exp(l_j) / (Σ exp(l_j) + exp(sink)), in float64."""
    exact = case.reference()
    total = exact.lse.exp() + sinks.double().exp()
    return exact.out * (exact.lse.exp() / total)[..., None], total.log()


# With `node` every row has several partials, with `sequence` some have none.
@pytest.mark.parametrize("grouping", ["node", "sequence"])
def test_a_sink_takes_its_share(grouping: str) -> None:
    attention, case = planned(SPEC, grouping)
    assert (attention.last_plan.dests < 0).any() == (grouping == "sequence")
    sinks = torch.linspace(-4, 9, HEADS)
    out, lse = attention.run(case.q, case.buffers, sinks=sinks)
    exact_out, exact_lse = with_sinks(case, sinks)
    bound = replace(case, sinks=sinks).reference().bound()
    assert (out - exact_out).abs().max() <= bound.out
    assert (lse - exact_lse).abs().max() <= bound.lse


def test_the_oracle_has_the_same_definition() -> None:
    case = tensors(FOREST, SMALL)
    sinks = torch.linspace(-4, 9, HEADS)
    torch.testing.assert_close(
        tuple(replace(case, sinks=sinks).reference()), with_sinks(case, sinks)
    )


def test_sinks_of_merged_states() -> None:
    """A sink that meets the state after the merge is the sink that kernels know."""
    attention, case = planned(SMALL)
    sinks = torch.linspace(-4, 9, HEADS)
    out, lse = apply_sinks(*attention.run(case.q, case.buffers), sinks)
    exact = replace(case, sinks=sinks).reference()
    # The weight of what is no sink has an error of lse's, and is multiplied in one rounding.
    bound = case.reference().bound()
    assert (out - exact.out).abs().max() <= bound.out + bound.lse * exact.max_value
    assert (lse - exact.lse).abs().max() <= 2 * bound.lse


def test_a_row_that_sees_nothing_sees_the_sink() -> None:
    attention, case = planned(SPEC)
    sinks = torch.arange(HEADS, dtype=torch.float32)
    out, lse = attention.run(case.q, case.buffers, sinks=sinks)
    assert not out[-1].any() and torch.equal(lse[-1], sinks)


def test_no_sink_changes_nothing() -> None:
    (attention, case), (plain, _) = planned(SPEC), planned(SMALL)
    none = torch.full((HEADS,), -math.inf)
    found, wanted = attention.run(case.q, case.buffers, sinks=none), plain.run(case.q, case.buffers)
    bound = case.reference().bound()
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=bound.out)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=bound.lse)


def test_a_huge_sink_leaves_nothing() -> None:
    attention, case = planned(SPEC)
    out, lse = attention.run(case.q, case.buffers, sinks=torch.full((HEADS,), 1e4))
    assert not out.any()
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4), rtol=4 * 2**-24, atol=0)


def test_given_outputs_are_written_and_a_compiled_layer_agrees() -> None:
    attention, case = planned(SPEC)
    sinks = torch.linspace(-1, 3, HEADS)
    wanted = attention.run(case.q, case.buffers, sinks=sinks)
    out, lse = (torch.full_like(tensor, torch.nan) for tensor in wanted)
    found = attention.run(case.q, case.buffers, out, lse, sinks=sinks)
    assert found[0] is out and found[1] is lse
    torch.testing.assert_close((out, lse), wanted, rtol=0, atol=0)
    layer = torch.compile(TreeAttentionModule(attention), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(layer(case.q, case.buffers, sinks), wanted, rtol=0, atol=0)


def test_what_a_spec_without_sinks_costs_for_them() -> None:
    """Nothing: its kernels have no such argument."""
    arguments = [[p.name for p in merge_partials(spec).params] for spec in (SMALL, SPEC)]
    assert arguments[1] == [*arguments[0][:2], "sinks", *arguments[0][2:]]
    assert "sinks" not in partial_attention(SMALL, TILE).script()
    assert "sinks" in partial_attention(SPEC, TILE).script()


def test_refusals() -> None:
    attention, case = planned(SPEC)
    with pytest.raises(InputError, match="sinks is None; expected a tensor, since the spec has"):
        attention.run(case.q, case.buffers)
    for sinks, sentence in (
        (torch.zeros(5), "sinks has shape [5]; expected [4]"),
        (torch.zeros(4).double(), "sinks has dtype float64; expected float32"),
        (torch.zeros(8)[::2], "sinks has strides (2,); expected 1 as the last"),
        ([0.0] * 4, "sinks is list; expected a torch.Tensor"),
        (torch.nn.Parameter(torch.zeros(4)), "sinks requires grad"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            attention.run(case.q, case.buffers, sinks=sinks)
    with pytest.raises(InputError, match=re.escape("kv has 1 tensors; expected 2: k, v")):
        attention.run(case.q, case.buffers[:1], sinks=torch.zeros(4))
    with pytest.raises(InputError, match=re.escape("kv has 2 tensors; expected 3: k, v, sinks")):
        torch.ops.deft_tvm.tree_attention(case.q, list(case.buffers), *attention.operands)
    plain, _ = planned(SMALL)
    with pytest.raises(InputError, match="sinks is given; expected none, since the spec has sinks"):
        plain.run(case.q, case.buffers, sinks=torch.zeros(4))


def test_sinks_that_are_not_one_a_head() -> None:
    out, lse = torch.zeros(3, 4, 8), torch.zeros(3, 4)
    for sinks, described in (
        (torch.zeros(5), "[5] on cpu"),
        (torch.zeros(3), "[3] on cpu"),
        (torch.zeros(4, 1), "[4, 1] on cpu"),
        (torch.zeros(4, device="meta"), "[4] on meta"),
    ):
        sentence = f"sinks has shape {described}; expected one logit for each of 4 query heads"
        with pytest.raises(InputError, match=re.escape(sentence)):
            apply_sinks(out, lse, sinks)


def test_sinks_are_taken_in_where_the_states_are() -> None:
    """A row that sees nothing, under a head without a sink and one with."""
    out, lse = torch.zeros(1, 2, 8), torch.full((1, 2), -math.inf)
    found = apply_sinks(out, lse, torch.tensor([-math.inf, 2.0]))
    assert found[0] is out and found[1] is lse
    assert not out.any() and lse.tolist() == [[-math.inf, 2.0]]
    out, lse = torch.ones(1, 2, 8), torch.zeros(1, 2)
    apply_sinks(out, lse, torch.tensor([-math.inf, 0.0]))
    half, log2 = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, math.log(2)]])
    # A logarithm, a difference and an exponential of numbers below 1, each rounded once.
    torch.testing.assert_close(out, half[..., None].expand(1, 2, 8), rtol=0, atol=3 * 2**-24)
    torch.testing.assert_close(lse, log2, rtol=0, atol=2 * 2**-24)

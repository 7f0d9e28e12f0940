"""Caches in 8 bits: rounding to them, decoding in kernels, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from built import artifact
from compiled import few_and_many, worst
from hypothesis import given
from hypothesis import strategies as st

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.dtypes import FP8
from deft_tvm.errors import InputError, PlanError, SpecError
from deft_tvm.fp8 import dequantize, quantize
from deft_tvm.plan import traffic
from deft_tvm.plan.cost import kv_bytes
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse, tensors

FORESTS = (
    "few_shot:prompt=150,branches=7,tokens=20,vary=9",
    "speculative:nodes=26,context=70",
)
SPECS = {
    "gqa-f32": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, kv_dtype=FP8),
    "gqa-bf16-hnd-sinks": AttentionSpec.gqa(
        num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16", kv_dtype=FP8, layout="HND",
        sinks=True,
    ),
    "gqa-f16-odd-width": AttentionSpec.gqa(
        num_q_heads=6, num_kv_heads=2, head_dim=21, dtype="float16", kv_dtype=FP8, page_size=1
    ),
    "mla-bf16": AttentionSpec.mla(
        num_q_heads=16, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64,
        dtype="bfloat16", kv_dtype=FP8, page_size=64,
    ),
    "gta-bf16-window": AttentionSpec.gta(
        num_q_heads=8, num_kv_heads=2, head_dim=64, rope_dim=32, dtype="bfloat16", kv_dtype=FP8,
        window=40,
    ),
}  # fmt: skip
SMALL = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=4, kv_dtype=FP8)


@pytest.mark.parametrize("name", SPECS)
def test_kernels_are_exact(name: str) -> None:
    """Beside a reference that multiplies the same stored elements with the same scales."""
    spec = SPECS[name]
    kernels = few_and_many(spec)
    for forest in FORESTS:
        for scales in ("head", "page"):
            case = tensors(parse(forest).forest, spec, scales=scales)
            assert worst(kernels, case) <= 1, (forest, scales)


@pytest.mark.parametrize("name", SPECS)
def test_one_line_spells_it(name: str) -> None:
    text = str(SPECS[name])
    assert AttentionSpec.parse(text) == SPECS[name]
    assert "kv_dtype=e4m3" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_element_is_decoded_exactly(dtype: str) -> None:
    """A row that sees one token returns its value: all 256 of them, NaN for two."""
    spec = AttentionSpec.gqa(
        num_q_heads=1, num_kv_heads=1, head_dim=256, page_size=1, dtype=dtype, kv_dtype=FP8
    )
    attention = TreeAttention(spec, artifact(spec))
    attention.plan(Forest.from_parents([-1], [1]))
    v = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 256)
    q, k = torch.ones(1, 1, 256, dtype=getattr(torch, dtype)), torch.zeros_like(v)
    out, _ = attention.run(q, (k, v, torch.tensor([7.0]), torch.tensor([0.25])))
    wanted = v.float().flatten() * 0.25
    assert int(wanted.isnan().sum()) == 2 and wanted.isfinite().sum() == 254
    torch.testing.assert_close(out.float().flatten(), wanted, rtol=0, atol=0, equal_nan=True)


@given(
    st.integers(0, 2**16), st.booleans(), st.booleans(), st.sampled_from((1e-20, 1e-3, 1.0, 1e20))
)
def test_rounding(seed: int, hnd: bool, by_page: bool, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    cache = size * torch.randn(3, 4, 4, 6, generator=random)
    cache[1] = 0.0
    layout = "HND" if hnd else "NHD"
    stored, scales = quantize(cache, layout=layout, by_page=by_page)
    assert stored.dtype == torch.float8_e4m3fn and scales.shape == ((3, 4) if by_page else (4,))
    back = dequantize(stored, scales.double(), layout=layout)
    # Half an ulp of three bits of mantissa, or half the smallest subnormal times the scale; the
    # quotient's own rounding in float32 is far below both.
    largest = scales.max() * 2.0**-10
    assert ((back - cache.double()).abs() <= cache.abs() * 2.0**-4 * (1 + 1e-6) + largest).all()
    heads = (0, 2, 3) if hnd else (0, 1, 3)
    per_head = cache.abs().amax(heads)
    assert (back.abs().amax(heads).float() - per_head).abs().max() <= per_head.max() * 1e-6


def test_what_holds_no_token_stays_nan_and_does_not_count() -> None:
    cache = torch.full((2, 4, 1, 3), torch.nan)
    cache[0, 0] = torch.tensor([[1.0, -2.0, 0.5]])
    stored, scales = quantize(cache, by_page=True)
    assert stored.float()[0, 0].tolist() == [[224.0, -448.0, 112.0]]
    assert stored.float()[0, 1:].isnan().all() and stored.float()[1].isnan().all()
    torch.testing.assert_close(scales, torch.tensor([[2 / 448], [1.0]]))


def test_caches_without_tokens_and_with_tiny_ones() -> None:
    stored, scales = quantize(torch.empty(0, 4, 2, 3))
    assert stored.shape == (0, 4, 2, 3) and scales.tolist() == [1.0, 1.0]
    tiny = torch.tensor([[[1e-43, 0.0, -1e-44]]])
    stored, scales = quantize(tiny)
    assert stored.float().isfinite().all() and scales.item() > 0


def test_bytes_are_a_quarter_and_scales_are_counted() -> None:
    wide = replace(SMALL, buffers=tuple(replace(b, dtype="float32") for b in SMALL.buffers))
    narrow, full = kv_bytes(SMALL), kv_bytes(wide)
    assert {kind: 4 * each for kind, each in narrow.items()} == full
    plans = []
    for spec in (SMALL, wide):
        attention = TreeAttention(spec, artifact(spec), grouping="node")
        case = tensors(Forest.from_parents([-1, 0, 0], [40, 9, 5]), spec)
        plans.append(traffic(attention.plan(case.forest, case.pages), spec).tree)
    eight, whole = plans
    assert 4 * eight.kv == whole.kv
    # A scale of K and one of V beside each page number.
    assert eight.indices - whole.indices == 2 * 4 * SMALL.num_kv_heads * (10 + 3 + 2)


def test_contiguous_caches() -> None:
    attention = TreeAttention(SMALL, artifact(SMALL))
    case = tensors(Forest.from_parents([-1, 0, 0], [40, 9, 5]), SMALL, contiguous=True)
    attention.plan(case.forest)
    out, lse = attention.run(case.q, case.kv)
    exact = case.reference()
    assert (out - exact.out).abs().max() <= exact.bound().out
    assert (lse - exact.lse).abs().max() <= exact.bound().lse


def test_refusals() -> None:
    attention = TreeAttention(SMALL, artifact(SMALL))
    case = tensors(Forest.from_parents([-1, 0], [9, 5]), SMALL)
    attention.plan(case.forest, case.pages)
    k, v, k_scales, v_scales = case.kv
    for kv, sentence in (
        ((k, v), "kv has 2 tensors; expected 4: k, v, scales of k, scales of v"),
        ((k.float(), v, k_scales, v_scales), "kv[0] (k) has dtype float32; expected float8_e4m3fn"),
        ((k, v, k_scales, v_scales[1:]), "kv[3] (scales of v) has shape [6, 2]; expected [7, 2]"),
        ((k, v, k_scales[0, :1], v_scales), "kv[2] (scales of k) has shape [1]; expected [2]"),
        ((k, v, k_scales.double(), v_scales), "kv[2] (scales of k) has dtype float64"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            attention.run(case.q, kv)
    with pytest.raises(InputError, match="layout is 'hnd'; expected one of NHD, HND"):
        quantize(torch.zeros(3, 2, 4, 8), layout="hnd")
    with pytest.raises(InputError, match="cache has infinite elements; expected finite ones"):
        quantize(torch.full((3, 2, 4), torch.inf))
    with pytest.raises(PlanError, match="a tile's operand is float16; expected float32 or"):
        tasks_for(SMALL, DeviceProfile.detect(), [TileShape(16, 16, "float16")])
    with pytest.raises(InputError, match=r"cache has shape \[3, 2, 4\]; expected \[pages, page_"):
        quantize(torch.zeros(3, 2, 4), by_page=True)


def test_specs_that_make_no_sense() -> None:
    with pytest.raises(SpecError, match="dtype is 'float8_e4m3fn'; expected one of float32"):
        replace(SMALL, dtype=FP8)
    one = (SMALL.buffers[0], CacheBuffer("v", 2, 16, "float32"))
    with pytest.raises(SpecError, match="K is float8_e4m3fn and V float32; expected both of them"):
        replace(SMALL, buffers=one)
    rope = (*SMALL.buffers, CacheBuffer("rope", 1, 8, FP8))
    with pytest.raises(SpecError, match="rope is 'float8_e4m3fn'; expected one of float32"):
        replace(SMALL, buffers=rope, rope=2, k=Region(0, 0, 16))

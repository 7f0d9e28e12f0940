"""MLA, GLA and GTA as specs: their definitions, what they cache, and how they are divided."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import pytest
import torch
from compiled import few_and_many, worst
from unabsorbed import Weights, latent_attention

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError, SpecError
from deft_tvm.kernels.numerics import TANH_DEGREE_4
from deft_tvm.kernels.partial import partial_attention
from deft_tvm.plan.cost import kv_bytes, partial_bytes, token_bytes
from deft_tvm.plan.intensity import shares
from deft_tvm.pytorch import absorb_query, expand_output
from deft_tvm.reference import tree_attention
from deft_tvm.schedules import PartialTask, schedule
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, Region, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse, tensors

FORESTS = {
    "few_shot": parse("few_shot:prompt=150,branches=7,tokens=20,vary=9").forest,
    "draft of 8": parse("speculative:nodes=8,context=900").forest,
    "draft of 26": parse("speculative:nodes=26,context=70").forest,
    "draft of 256": parse("speculative:nodes=256,context=40").forest,
    "chunks appended to branches": Forest.from_parents(
        [-1, 0, 0, 0, 2], [90, 33, 8, 17, 40], [0, 20, 8, 1, 33]
    ),
}

SPECS = {
    "mla-tiny": AttentionSpec.mla(
        num_q_heads=4, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8
    ),
    "gla3-odd": AttentionSpec.gla(
        num_q_heads=6, num_latent_heads=3, latent_dim=22, rope_dim=6, nope_dim=10
    ),
    "gla2-copies": AttentionSpec.gla(
        num_q_heads=8, num_latent_heads=2, latent_dim=64, rope_dim=32, nope_dim=32, rope_heads=2
    ),
    "gla2-medium-bf16": AttentionSpec.gla(
        num_q_heads=16, num_latent_heads=2, latent_dim=128, rope_dim=32, nope_dim=64,
        dtype="bfloat16", page_size=64,
    ),
    "mla-no-rope": AttentionSpec.mla(
        num_q_heads=8, kv_lora_rank=64, qk_rope_head_dim=0, scale=0.125, page_size=1
    ),
    "mla-medium-f16": AttentionSpec.mla(
        num_q_heads=16, kv_lora_rank=256, qk_rope_head_dim=32, qk_nope_head_dim=64,
        dtype="float16",
    ),
    "gta3-odd": AttentionSpec.gta(num_q_heads=6, num_kv_heads=3, head_dim=24, rope_dim=12),
    "gta4-bf16-f32rope": AttentionSpec.gta(
        num_q_heads=16, num_kv_heads=4, head_dim=64, rope_dim=16, dtype="bfloat16", layout="HND",
        rope_dtype="float32",
    ),
    "gqa-capped": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, soft_cap=3.0),
    "mla-capped-bf16": AttentionSpec.mla(
        num_q_heads=8, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32,
        dtype="bfloat16", soft_cap=30.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_kernels_are_exact(name: str) -> None:
    spec = SPECS[name]
    kernels = few_and_many(spec)
    for forest, max_logit in product(FORESTS, (None, 60.0)):
        case = tensors(FORESTS[forest], spec, max_logit=max_logit)
        assert worst(kernels, case) <= 1, (forest, max_logit)


@pytest.mark.parametrize("name", SPECS)
def test_one_line_spells_it(name: str) -> None:
    spec = SPECS[name]
    text = str(spec)
    assert AttentionSpec.parse(text) == spec
    assert text.split(":")[0] == name[:3] or spec.rope is None
    assert set(spec.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_+")


def test_what_the_variants_read() -> None:
    mla = AttentionSpec.mla(
        num_q_heads=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        dtype="bfloat16", page_size=64,
    )  # fmt: skip
    assert mla.tied and (mla.q_width, mla.v_width) == (576, 512)
    assert mla.scale == 192**-0.5
    assert kv_bytes(mla) == {"k": 0, "v": 1024, "rope": 128}
    assert partial_bytes(mla) * 2 // token_bytes(mla) == 456

    gta = AttentionSpec.gta(num_q_heads=32, num_kv_heads=8, head_dim=128, rope_dim=64)
    assert gta.k == Region(0, 0, 64) and gta.v == Region(0, 0, 128) and gta.scale == 128**-0.5


@pytest.mark.parametrize("kind", ["llvm", "cuda"])
def test_a_tied_state_is_loaded_once_by_the_scheduled_kernel(kind: str) -> None:
    """Its one tile serves as K and V: nothing else reads the cache, but to ask for it ahead."""
    spec = SPECS["gta4-bf16-f32rope"]
    device = DeviceProfile.detect() if kind == "llvm" else DeviceProfile.nominal()
    target = device.target() if kind == "llvm" else {"kind": "cuda", "arch": "sm_90a"}
    features = frozenset(device.features if kind == "llvm" else ())
    for tile in default_tiles(spec, kind, features):
        task = PartialTask(spec, target, features, tile)
        lines = schedule(task)[0].mod.script().splitlines()
        read = [line for line in lines if re.search(r" = .*_cache\[", line)]
        assert len([line for line in read if "v_cache[" in line]) == 1, tile
        assert len([line for line in read if "rope_cache[" in line]) == 1, tile
        assert not any("k_cache[" in line for line in lines), tile


def test_what_is_not_asked_for_is_not_in_the_kernel() -> None:
    plain = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
    tile = TileShape(16, 16, "float32")
    written = partial_attention(plain, tile).script()
    for option, trace in (
        ({"soft_cap": 3.0}, str(TANH_DEGREE_4[0])[:9]),
        ({"window": 9}, "row_positions["),
        ({"sinks": True}, "sinks["),
    ):
        changed = dataclasses.replace(plain, **option)
        assert trace in partial_attention(changed, tile).script(), option
        assert trace not in written, option
    eight = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, kv_dtype="float8_e4m3fn")
    assert "k_scales[" in partial_attention(eight, tile).script()
    assert "k_scales[" not in written


def variants(
    heads: int, width: int, rope: int, kv_heads: int, latents: tuple[int, ...]
) -> dict[str, AttentionSpec]:
    """The variants of one size in bfloat16; a latent is 2 widths, MLA's 4."""
    common = {"num_q_heads": heads, "dtype": "bfloat16"}
    grouped = {**common, "num_kv_heads": kv_heads, "head_dim": width}
    latent = {"rope_dim": rope, "nope_dim": width}
    made = {
        "MHA": AttentionSpec.gqa(**{**grouped, "num_kv_heads": heads}),
        "MQA": AttentionSpec.gqa(**{**grouped, "num_kv_heads": 1}),
        f"GQA-{kv_heads}": AttentionSpec.gqa(**grouped),
        f"GTA-{kv_heads}": AttentionSpec.gta(**grouped, rope_dim=rope),
        "MLA": AttentionSpec.mla(
            **common, kv_lora_rank=4 * width, qk_rope_head_dim=rope, qk_nope_head_dim=width
        ),
    }
    for n in latents:
        made[f"GLA-{n}"] = AttentionSpec.gla(
            **common, num_latent_heads=n, latent_dim=2 * width, **latent
        )
    return made


# arXiv 2505.21487, tables 5, 15, 23 and 26: bytes per token, layer and rank in bfloat16, at 1, 2, 4
# and 8 ranks; the last one counts elements in units of the head width.
XL = variants(16, 128, 64, 4, (2,))
MEDIUM = variants(16, 64, 32, 4, (2,))
LLAMA = variants(32, 128, 64, 8, (2,))
DEEPSEEK = variants(128, 128, 64, 8, (2, 4, 8))
D = 2 * 128
PUBLISHED = {
    "XL MHA": (XL["MHA"], (8192, 4096, 2048, 1024)),
    "XL GQA-4": (XL["GQA-4"], (2048, 1024, 512, 512)),
    "XL GTA-4": (XL["GTA-4"], (1152, 640, 384, 384)),
    "XL GLA-2": (XL["GLA-2"], (1152, 640, 640, 640)),
    "XL MLA": (XL["MLA"], (1152, 1152, 1152, 1152)),
    "medium MHA": (MEDIUM["MHA"], (4096, 2048, 1024, 512)),
    "medium GQA-4": (MEDIUM["GQA-4"], (1024, 512, 256, 256)),
    "medium MQA": (MEDIUM["MQA"], (256, 256, 256, 256)),
    "medium GTA-4": (MEDIUM["GTA-4"], (576, 320, 192, 192)),
    "medium GLA-2": (MEDIUM["GLA-2"], (576, 320, 320, 320)),
    "medium MLA": (MEDIUM["MLA"], (576, 576, 576, 576)),
    "Llama MHA": (LLAMA["MHA"], (64 * D, 32 * D, 16 * D, 8 * D)),
    "Llama GQA-8": (LLAMA["GQA-8"], (16 * D, 8 * D, 4 * D, 2 * D)),
    "Llama GTA-8": (LLAMA["GTA-8"], (8.5 * D, 4.5 * D, 2.5 * D, 1.5 * D)),
    "Llama GLA-2": (LLAMA["GLA-2"], (4.5 * D, 2.5 * D, 2.5 * D, 2.5 * D)),
    "Llama MLA": (LLAMA["MLA"], (4.5 * D, 4.5 * D, 4.5 * D, 4.5 * D)),
    "Llama MQA": (LLAMA["MQA"], (2 * D, 2 * D, 2 * D, 2 * D)),
    "DeepSeek MLA": (DEEPSEEK["MLA"], (1152, 1152, 1152, 1152)),
    "DeepSeek GLA-2": (DEEPSEEK["GLA-2"], (1152, 640, 640, 640)),
    "DeepSeek GLA-4": (DEEPSEEK["GLA-4"], (2176, 1152, 640, 640)),
    "DeepSeek GLA-8": (DEEPSEEK["GLA-8"], (4224, 2176, 1152, 640)),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_cache_bytes_of_the_published_table(variant: str) -> None:
    spec, wanted = PUBLISHED[variant]
    ranks = (1, 2, 4, 8)
    assert tuple(spec.shard(0, n).kv_bytes_per_token for n in ranks) == wanted
    assert [spec.shard(n - 1, n).num_q_heads * n for n in ranks] == [spec.num_q_heads] * 4
    assert [share.kv_bytes for share in shares(spec)] == list(wanted)


def test_flops_a_byte_of_the_published_table() -> None:
    """arXiv 2505.21487, table 1, long contexts: 2 g q / m of g query heads a KV head, where m is
    2 for distinct keys and values and 1 for tied ones; rope ignored. MLA and GLA as figure 3 has
    them, with it."""
    for name, per_row in (("MHA", 1), ("MQA", 32), ("GQA-8", 4)):
        found = shares(LLAMA[name])[0].flops_per_byte
        assert [found[q] for q in (1, 2, 4)] == [per_row, 2 * per_row, 4 * per_row]
    bare = AttentionSpec.gta(
        num_q_heads=32, num_kv_heads=8, head_dim=128, rope_dim=0, dtype="bfloat16"
    )
    assert shares(bare)[0].flops_per_byte[1] == 2 * 4
    assert shares(DEEPSEEK["MLA"])[0].flops_per_byte[1] == pytest.approx(241.8, abs=0.05)
    assert shares(DEEPSEEK["GLA-2"])[1].flops_per_byte[1] == pytest.approx(115.2, abs=0.05)


# Rows that share a token at which a rank of H100, H200 and B200 turns compute-bound, at 1 to 8
# ranks: the ridge, dense bfloat16 FLOP/s over bytes/s, divided by FLOPs a byte of one row.
RIDGES = (989 / 3.35, 989 / 4.8, 2250 / 8.0)
TURNS = {
    "MLA": ((1.2, 0.9, 1.2), (2.4, 1.7, 2.3), (4.9, 3.4, 4.7), (9.8, 6.8, 9.3)),
    "GLA-2": ((2.3, 1.6, 2.2), (2.6, 1.8, 2.4), (5.1, 3.6, 4.9), (10.3, 7.2, 9.8)),
    "GLA-8": ((8.5, 5.9, 8.1), (8.7, 6.1, 8.3), (9.2, 6.4, 8.8), (10.3, 7.2, 9.8)),
    "GQA-8": ((74, 52, 70),) * 4,
    "GTA-8": ((39, 27, 37), (42, 29, 40), (46, 32, 44), (55, 39, 53)),
}


@pytest.mark.parametrize("variant", TURNS)
def test_where_sharing_gains_nothing_more(variant: str) -> None:
    spec = (LLAMA if variant[1] in "QT" else DEEPSEEK)[variant]
    for share, wanted in zip(shares(spec), TURNS[variant], strict=True):
        rows = [ridge / share.flops_per_byte[1] for ridge in RIDGES]
        places = 0 if wanted[0] > 11 else 1
        assert [round(r, places) for r in rows] == list(wanted), share.degree


def test_copies_of_what_does_not_divide() -> None:
    assert [s.copied_bytes for s in shares(XL["MLA"])] == [0, 1152, 3 * 1152, 7 * 1152]
    assert [s.copied_bytes for s in shares(XL["GLA-2"])] == [0, 128, 1408, 3968]
    odd = AttentionSpec.gqa(num_q_heads=6, num_kv_heads=3, head_dim=8)
    assert [share.degree for share in shares(odd)] == [1]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", ["XL GQA-4", "XL GTA-4", "XL GLA-2", "XL MLA"])
def test_shards_together_are_the_whole(variant: str, world: int) -> None:
    spec = dataclasses.replace(PUBLISHED[variant][0], dtype="float32")
    spec = dataclasses.replace(
        spec, buffers=tuple(dataclasses.replace(b, dtype="float32") for b in spec.buffers)
    )
    case = tensors(parse("few_shot:prompt=9,branches=3,tokens=4").forest, spec)
    whole = case.reference().out
    parts = []
    for rank in range(world):
        part, heads = spec.shard(rank, world), slice(*spec.heads_of_shard(rank, world))
        width = spec.num_q_heads // world
        buffers = tuple(
            b[:, :, heads].contiguous() if s.heads != 1 or spec.num_kv_heads == 1 else b
            for b, s in zip(case.buffers, spec.buffers, strict=True)
        )
        q = case.q[:, rank * width : (rank + 1) * width]
        parts.append(dataclasses.replace(case, spec=part, q=q, buffers=buffers).reference().out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 3), (0, 32)])
def test_shards_that_there_are_not(rank: int, world: int) -> None:
    with pytest.raises(SpecError, match=r"(rank|world) is -?\d+; expected"):
        XL["GQA-4"].shard(rank, world)


def test_the_scale_of_absorbed_widths_is_asked_for() -> None:
    with pytest.raises(SpecError, match="scale and the nope width are None; expected one"):
        AttentionSpec.mla(num_q_heads=4, kv_lora_rank=16, qk_rope_head_dim=4)
    with pytest.raises(SpecError, match="rope_dim is 24; expected less than head_dim, 24"):
        AttentionSpec.gta(num_q_heads=4, num_kv_heads=2, head_dim=24, rope_dim=24)
    with pytest.raises(SpecError, match=r"soft_cap is -1.0; expected a finite number above zero"):
        AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=24, soft_cap=-1.0)


@pytest.mark.parametrize("latents", [1, 2, 4])
@pytest.mark.parametrize("rope_dim", [0, 6])
def test_absorbed_is_unabsorbed(latents: int, rope_dim: int) -> None:
    spec, weights, step = _latent_step(latents, rope_dim)
    expanded, _ = latent_attention(step, weights, spec.scale)
    absorbed = _absorbed(spec, weights, step)
    found = expand_output(absorbed.out, weights.w_uv)
    torch.testing.assert_close(found, expanded, rtol=1e-12, atol=1e-12)


def test_a_bias_of_keys_moves_only_the_lse() -> None:
    spec, weights, step = _latent_step(2, 6)
    biased = dataclasses.replace(weights, b_uk=torch.randn(8, 10, dtype=torch.float64))
    out, lse = latent_attention(step, weights, spec.scale)
    out_biased, lse_biased = latent_attention(step, biased, spec.scale)
    torch.testing.assert_close(out, out_biased, rtol=1e-11, atol=1e-11)
    shift = spec.scale * torch.einsum("rhn,hn->rh", step.q_nope, biased.b_uk)
    torch.testing.assert_close(lse_biased - lse, shift, rtol=1e-10, atol=1e-10)
    assert shift.abs().max() > 0.1


def test_a_bias_of_values_is_added_once() -> None:
    spec, weights, step = _latent_step(2, 6)
    biased = dataclasses.replace(weights, b_uv=torch.randn(8, 12, dtype=torch.float64))
    out, _ = latent_attention(step, weights, spec.scale)
    out_biased, _ = latent_attention(step, biased, spec.scale)
    torch.testing.assert_close(out + biased.b_uv, out_biased, rtol=1e-12, atol=1e-12)


def test_the_scale_cannot_be_told_from_absorbed_widths() -> None:
    spec, weights, step = _latent_step(1, 6)
    expanded, _ = latent_attention(step, weights, spec.scale)
    guessed = dataclasses.replace(spec, scale=spec.q_width**-0.5)
    found = expand_output(_absorbed(guessed, weights, step).out, weights.w_uv)
    assert (found - expanded).abs().max() > 1e-3


def test_projections_that_do_not_fit() -> None:
    q = torch.zeros(3, 8, 10)
    with pytest.raises(InputError, match=r"w_uk has shape \(4, 10, 16\); expected 8 heads in"):
        absorb_query(q, q[..., :4], torch.zeros(4, 10, 16))
    with pytest.raises(InputError, match=r"w_uv .*; expected .* and width 10 in axis 2"):
        expand_output(q, torch.zeros(8, 12, 16))


def _latent_step(latents: int, rope_dim: int):
    """A small tree step of 8 heads, its weights, and the spec of its absorbed form."""
    from unabsorbed import Step

    spec = AttentionSpec.gla(
        num_q_heads=8, num_latent_heads=latents, latent_dim=16, rope_dim=rope_dim, nope_dim=10
    )
    step = Step.random([-1, 0, 0, 1], [5, 3, 1, 2], [1, 2, 0, 1], latents, rope_dim)
    return spec, Weights.random(8), step


def _absorbed(spec: AttentionSpec, weights: Weights, step):
    """The oracle of trees on absorbed queries, which projects nothing."""
    return tree_attention(
        absorb_query(step.q_nope, step.q_rope, weights.w_uk),
        (step.latent, step.rope)[: len(spec.buffers)],
        step.parents,
        step.lengths,
        step.rows,
        None,
        page_size=1,
        layout="NHD",
        num_kv_heads=spec.num_kv_heads,
        k=(0, 0, 16),
        v=(0, 0, 16),
        rope=spec.rope,
        scale=spec.scale,
    )

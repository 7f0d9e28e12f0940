"""An outside witness: DeepSeek-V2's and V3's attention of Hugging Face transformers, on a tree.

Its layer runs every path of the tree as a sequence; ours runs the tree once, on the latents and
rotated keys that the same layer's own projections make. Weights and hidden states are random.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from built import artifact
from torch import Tensor

from deft_tvm.pytorch import TreeAttention, absorb_query, expand_output
from deft_tvm.reference import FLOAT32_ROUNDING, tree_attention
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest

v2, v3 = (
    pytest.importorskip(
        f"transformers.models.deepseek_v{n}.modeling_deepseek_v{n}",
        reason=f"transformers with DeepSeek-V{n} is not installed",
    )
    for n in (2, 3)
)

HEADS, LATENT, NOPE, ROPE, VALUE, HIDDEN = 8, 32, 24, 16, 20, 64

# Three levels; every token has a row, so that every token of every path is compared.
FOREST = Forest.from_parents([-1, 0, 0, 1, 1, 2], [11, 5, 3, 4, 1, 6], [11, 5, 3, 4, 1, 6])
NODES = torch.arange(6).repeat_interleave(torch.from_numpy(FOREST.lengths.copy()))
BEGIN = (FOREST.lengths.cumsum() - FOREST.lengths).tolist()


def path(node: int) -> list[int]:
    """Tokens on the path to `node`, itself included."""
    above = path(int(FOREST.parents[node])) if node >= 0 and FOREST.parents[node] >= 0 else []
    return [*above, *range(BEGIN[node], BEGIN[node] + int(FOREST.lengths[node]))]


class Version3:
    """How the model makes a layer, angles and rotations."""

    config, attention = v3.DeepseekV3Config, v3.DeepseekV3Attention
    rotary = v3.DeepseekV3RotaryEmbedding

    @staticmethod
    def rotate(q: Tensor, k: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
        cos, sin = angles
        return v3.apply_rotary_pos_emb_interleave(q, k, cos, sin)

    @staticmethod
    def precise(angles: Any) -> Any:
        return tuple(table.double() for table in angles)


class Version2:
    """The same of the model before it, which rotates complex numbers, in float32."""

    config, attention = v2.DeepseekV2Config, v2.DeepseekV2Attention
    rotary, rotate = v2.DeepseekV2RotaryEmbedding, staticmethod(v2.apply_rotary_emb)

    @staticmethod
    def precise(angles: Any) -> Any:
        return angles


class Layer:
    """One attention layer of the model in float64, with the position of every token."""

    def __init__(self, version: Any, q_lora_rank: int | None) -> None:
        torch.manual_seed(0)
        self.version = version
        config = version.config(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=LATENT,
            qk_rope_head_dim=ROPE,
            qk_nope_head_dim=NOPE,
            v_head_dim=VALUE,
            attn_implementation="eager",
        )
        self.attention = version.attention(config, 0).double().eval()
        for weight in self.attention.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.rotary = version.rotary(config)
        self.hidden = torch.randn(FOREST.num_tokens, HIDDEN, dtype=torch.float64)

    def by_paths(self) -> Tensor:
        """[tokens, hidden] of the layer, each path to a leaf as a sequence."""
        out = torch.full_like(self.hidden, torch.nan)
        for leaf in (3, 4, 5):
            tokens = path(leaf)
            x = self.hidden[tokens][None]
            mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=x.dtype).triu(1)
            angles = self.angles(torch.arange(len(tokens)))
            mask = mask[None, None]
            found = self.attention(x, position_embeddings=angles, attention_mask=mask)
            out[tokens] = found[0][0]
        return out

    def angles(self, positions: Tensor) -> Any:
        return self.version.precise(self.rotary(self.hidden[None], positions[None]))

    def projected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope, q_rope ``[tokens, heads, ·]``, latent and rope ``[tokens, 1, ·]`` of the tree."""
        a, x = self.attention, self.hidden
        q = a.q_proj(x) if a.q_lora_rank is None else a.q_b_proj(a.q_a_layernorm(a.q_a_proj(x)))
        q_nope, q_rope = q.view(-1, HEADS, NOPE + ROPE).split([NOPE, ROPE], -1)
        latent, rope = a.kv_a_proj_with_mqa(x).split([LATENT, ROPE], -1)
        positions = torch.tensor([path(int(n)).index(t) for t, n in enumerate(NODES)])
        # The model has heads before tokens.
        q_rope, rope = self.version.rotate(
            q_rope.transpose(0, 1)[None], rope[None, None], self.angles(positions)
        )
        return (
            q_nope,
            q_rope[0].transpose(0, 1),
            a.kv_a_layernorm(latent)[:, None],
            rope[0, 0, :, None],
        )


@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("version", [Version2, Version3])
def test_mla_agrees_with_transformers(version: Any, q_lora_rank: int | None) -> None:
    with torch.no_grad():
        layer = Layer(version, q_lora_rank)
        attention = layer.attention
        spec = AttentionSpec.mla(
            num_q_heads=HEADS,
            kv_lora_rank=LATENT,
            qk_rope_head_dim=ROPE,
            qk_nope_head_dim=NOPE,
            scale=attention.scaling,
        )
        up = attention.kv_b_proj.weight.view(HEADS, NOPE + VALUE, LATENT)
        w_uk, w_uv = up.split([NOPE, VALUE], 1)
        q_nope, q_rope, latent, rope = layer.projected()
        exact_q = absorb_query(q_nope, q_rope, w_uk)
        q, *cache = (tensor.float() for tensor in (exact_q, latent, rope))

        ours = TreeAttention(spec, artifact(spec))
        ours.plan(FOREST)
        out, _ = ours.run(q, cache)
        found = attention.o_proj(expand_output(out.double(), w_uv).flatten(1))
        wanted = layer.by_paths()

        exact = tree_attention(
            q, cache, FOREST.parents.tolist(), FOREST.lengths.tolist(), FOREST.rows.tolist(), None,
            page_size=1, layout="NHD", num_kv_heads=1, k=(0, 0, LATENT), v=(0, 0, LATENT), rope=1,
            scale=spec.scale,
        )  # fmt: skip
        # q and the cache were rounded to float32: a logit moves by twice half an ulp of the sum of
        # its absolute terms, the softmax by twice that, and V by half an ulp of its own.
        keys = torch.cat([latent, rope], -1)[:, 0].abs()
        terms = spec.scale * float((exact_q.abs() @ keys.T).max())
        rounded = FLOAT32_ROUNDING * (4 * terms + 1) * exact.max_value
        # What follows is linear: its largest row sum of absolute weights carries the error over.
        heads = attention.o_proj.weight.view(HIDDEN, HEADS, VALUE)
        weights = torch.einsum("ohv,hvc->ohc", heads, w_uv).abs().sum((1, 2)).max()
        assert not wanted.isnan().any()
        assert (found - wanted).abs().max() <= (exact.bound().out + rounded) * weights
        assert wanted.abs().max() > 0.1

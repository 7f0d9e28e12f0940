"""A small decoder in the shape of today's large ones; which attention it has is not its business.

Grouped-query attention, rotary positions, RMS norms and a gated MLP, as in Llama 3 (Grattafiori et
al. 2024, section 3.2), with seeded random weights. Tokens of any sequences are simply rows: only
the `Attend` that is passed in knows which of them see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deft_tvm.dtypes import Dtype
from deft_tvm.spec import AttentionSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From layer, q ``[rows, Hq, width]``, and k and v ``[rows, Hkv, width]`` of the same tokens, which
are rotated already, to out ``[rows, Hq, width]``. It keeps k and v for the rows that come later."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; heads as in the large models that serve trees."""

    vocabulary: int = 256
    width: int = 512
    layers: int = 2
    q_heads: int = 32
    kv_heads: int = 8
    head_width: int = 128

    def spec(self, dtype: Dtype) -> AttentionSpec:
        """The attention of every layer."""
        return AttentionSpec.gqa(
            num_q_heads=self.q_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_width,
            dtype=dtype,
        )


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        q_width = shape.q_heads * shape.head_width
        kv_width = shape.kv_heads * shape.head_width
        self.heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
        self.before_attention = nn.RMSNorm(shape.width, eps=1e-5)
        self.qkv = nn.Linear(shape.width, q_width + 2 * kv_width, bias=False)
        self.out = nn.Linear(q_width, shape.width, bias=False)
        self.before_mlp = nn.RMSNorm(shape.width, eps=1e-5)
        self.gate_up = nn.Linear(shape.width, 8 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)
        self.head_width = shape.head_width

    def forward(self, x: Tensor, angles: Tensor, index: int, attend: Attend) -> Tensor:
        projected = self.qkv(self.before_attention(x)).unflatten(-1, (-1, self.head_width))
        q, k, v = projected.split(self.heads, dim=1)
        attended = attend(index, rotate(q, angles), rotate(k, angles), v)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """From bytes to logits of the next byte."""

    def __init__(self, shape: Shape | None = None, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.embed = nn.Embedding(self.shape.vocabulary, self.shape.width)
        self.layers = nn.ModuleList(Layer(self.shape) for _ in range(self.shape.layers))
        self.norm = nn.RMSNorm(self.shape.width, eps=1e-5)
        self.head = nn.Linear(self.shape.width, self.shape.vocabulary, bias=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=random)
            if name.endswith("qkv.weight"):
                # Logits of deviation 2 and not 1: heads look at some bytes more than at others.
                weight.data[: self.shape.q_heads * self.shape.head_width] *= 2
        nn.init.normal_(self.embed.weight, generator=random)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits ``[rows, vocabulary]`` of int64[rows] `tokens` at their `positions`."""
        x = self.embed(tokens)
        angles = rotary_angles(positions, self.shape.head_width)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, index, attend)
        return self.head(self.norm(x))


def rotary_angles(positions: Tensor, width: int) -> Tensor:
    """float32[rows, 1, width / 2] (Su et al. 2021, equation 15)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return (positions[:, None] * frequencies)[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + width / 2) of ``x [rows, heads, width]``, in float32."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    return turned.to(x.dtype)

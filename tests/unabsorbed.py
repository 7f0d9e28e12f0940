"""Latent attention as the papers write it: keys and values expanded for every head, no absorption.

MLA (DeepSeek-V2, equations 9 to 19) and GLA (arXiv 2505.21487, section 3.3.2), in float64 and token
by token; shares nothing with what it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NOPE, VALUE, LATENT = 10, 12, 16


@dataclass(frozen=True)
class Weights:
    """Up-projections of every head: keys [heads, nope, latent], values [heads, value, latent]."""

    w_uk: Tensor
    w_uv: Tensor
    b_uk: Tensor
    b_uv: Tensor

    @classmethod
    def random(cls, heads: int) -> Weights:
        torch.manual_seed(1)
        w_uk = torch.randn(heads, NOPE, LATENT, dtype=torch.float64)
        w_uv = torch.randn(heads, VALUE, LATENT, dtype=torch.float64)
        return cls(w_uk, w_uv, w_uk.new_zeros(heads, NOPE), w_uv.new_zeros(heads, VALUE))


@dataclass(frozen=True)
class Step:
    """One decoding step on a tree: its queries, and the cache of its tokens node by node."""

    parents: list[int]
    lengths: list[int]
    rows: list[int]
    q_nope: Tensor
    q_rope: Tensor
    latent: Tensor
    rope: Tensor

    @classmethod
    def random(
        cls, parents: list[int], lengths: list[int], rows: list[int], latents: int, rope: int
    ) -> Step:
        torch.manual_seed(2)
        tokens, queries = sum(lengths), sum(rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        return cls(
            parents,
            lengths,
            rows,
            normal(queries, 8, NOPE),
            normal(queries, 8, rope),
            normal(tokens, latents, LATENT),
            normal(tokens, 1, rope),
        )

    def path(self, node: int) -> list[int]:
        """Tokens on the path to `node`, itself included."""
        begin = [sum(self.lengths[:n]) for n in range(len(self.lengths))]
        tokens: list[int] = []
        while node >= 0:
            tokens = [*range(begin[node], begin[node] + self.lengths[node]), *tokens]
            node = self.parents[node]
        return tokens


def latent_attention(step: Step, weights: Weights, scale: float) -> tuple[Tensor, Tensor]:
    """Output [rows, heads, value width] and LSE [rows, heads]."""
    heads, latents = weights.w_uk.shape[0], step.latent.shape[1]
    outs, lses, row = [], [], 0
    for node, count in enumerate(step.rows):
        for i in range(count):
            path = step.path(node)
            seen = path[: len(path) - (count - 1 - i)]
            out, lse = [], []
            for head in range(heads):
                latent = step.latent[seen, head * latents // heads]
                key = latent @ weights.w_uk[head].T + weights.b_uk[head]
                value = latent @ weights.w_uv[head].T + weights.b_uv[head]
                logits = key @ step.q_nope[row, head] + step.rope[seen, 0] @ step.q_rope[row, head]
                weight = [math.exp(scale * float(logit)) for logit in logits]
                total = sum(weight)
                out.append(sum(w * v for w, v in zip(weight, value, strict=True)) / total)
                lse.append(math.log(total))
            outs.append(torch.stack(out))
            lses.append(torch.tensor(lse, dtype=torch.float64))
            row += 1
    return torch.stack(outs), torch.stack(lses)

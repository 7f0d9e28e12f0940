"""How far logits of a model of transformers move by what rounding in attention explains.

As `deft_tvm.demo.decode.rounding_nudge` finds it for the demo's model: each attention's output is
moved by as much as two right kernels may differ, and the model's own later layers tell what becomes
of that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from deft_tvm.reference import Exact

NAME = "nudged"


def sequence_logits(model: Any, text: Tensor, implementation: str = "eager") -> Tensor:
    """``[tokens, vocabulary]`` by transformers alone, without a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits: Tensor = model(text[None], use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return logits


def explained(model: Any, texts: Sequence[Tensor]) -> float:
    """The largest move of a logit of any of the texts."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    random.manual_seed(0)
    moves = [sequence_logits(model, t, NAME) - sequence_logits(model, t) for t in texts]
    return max(float(move.float().abs().max()) for move in moves)


random = torch.Generator()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """The layer's own eager attention, each element of its output moved up or down.

    Both kernels are within `Exact.bound` of the exact output, so within twice that of each other.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, _ = eager(module, query, key, value, mask, **asked)
    terms, values = _terms(module, query, key, value)
    logit = asked["scaling"] * terms
    if asked.get("softcap") is not None:
        logit *= 2  # `deft_tvm.reference.sensitivity` is at most that
    if asked.get("s_aux") is not None:
        logit = max(logit, float(asked["s_aux"].abs().max()))
    exact = Exact(out.float(), out, logit, values, key.shape[2])
    dtype = str(out.dtype).removeprefix("torch.")
    signs = torch.randint(0, 2, out.shape, generator=random) * 2 - 1
    return (out + 2 * exact.bound(dtype, dtype).out * signs).to(out.dtype), None


def _terms(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float]:
    """What a logit and a value are at most, as sums of absolute terms.

    By Cauchy and Schwarz, the product of the longest q and the longest K. Absorbed, a logit is a
    sum over elements of q, of the key's projection and of the latent, and a value one over the
    last two; expanded, keys and values are rounded as those sums are. A latent comes out of an
    RMS norm, so that its length is at most the square root of its width, times the norm's weight.
    """
    query, key = query.float(), key.float()
    longest = float(query.norm(dim=-1).max() * key.norm(dim=-1).max())
    if not hasattr(module, "kv_b_proj"):
        return longest, float(value.abs().max())
    norm = module.kv_a_layernorm.weight
    latent = len(norm) ** 0.5 * float(norm.abs().max())
    up = module.kv_b_proj.weight.view(query.shape[1], -1, len(norm)).norm(dim=-1)
    width = module.qk_nope_head_dim
    nope = torch.einsum("bhln,hn->bhl", query[..., :width].abs(), up[:, :width]).max() * latent
    rope = query[..., width:].norm(dim=-1).max() * key[..., width:].norm(dim=-1).max()
    return float(nope + rope), float(up[:, width:].max()) * latent

"""The attention function of a transformers model, and its mask, by the name ``deft_tvm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from deft_tvm.errors import InputError
from deft_tvm.integrations.huggingface.checks import check_agrees, check_asked
from deft_tvm.integrations.huggingface.handover import NAME, take_note
from deft_tvm.integrations.huggingface.latent import Absorbed
from deft_tvm.integrations.platforms import check_platform
from deft_tvm.pytorch.gradients import check_no_gradient

IN_THE_MASK = "in the mask"
"""The window of a model that masks by it, and does not tell its attention."""


def register() -> None:
    """Let models be given ``attn_implementation="deft_tvm"``; may be called again.

    Raises:
        DeftError: this is no platform that is supported.
    """
    check_platform()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding)


def padding(
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **shape: Any,
) -> Tensor | None:
    """The mask as attention gets it: that of padding, since causality needs none.

    Raises:
        InputError: attention is to be masked in yet another way.
    """
    if use_vmap or not allow_is_causal_skip:
        raise InputError(
            "attention is masked by more than causality, a window and padding (packed sequences, "
            "blocks, both directions or a function); expected nothing but these"
        )
    return attention_mask


@torch.compiler.disable
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | str | None = IN_THE_MASK,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over what its cache holds and gets.

    Args:
        module: the layer's attention, with ``layer_idx``.
        query: ``[B, heads, L, width]``, rotated.
        key: as the cache's ``update`` returned it, or made of that; not read.
        value: the same.
        attention_mask: None, or ``[B, columns]``, see `padding`.
        scaling: of the scores; None: as the width says.
        dropout: 0.
        sliding_window: as the layer's spec has it; by default it is that of the model's mask.
        softcap: the same.
        s_aux: ``[heads]``, sinks where the spec has them.
        asked: other keywords of the model, see `check_asked`.

    Returns:
        ``[B, L, heads, value width]``, zeros where there is padding; and None, no weights.

    Raises:
        InputError: the cache is none of deft_tvm's, or the model asks for what cannot be done.
        OutOfPages: the cache may not grow any more.
    """
    note = take_note(getattr(module, "layer_idx", None), key)
    layer, cache = note.layer, note.cache
    spec = cache.specs[layer]
    check_no_gradient(query, note.new)
    check_asked(module, dropout, asked)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window == IN_THE_MASK:
        windowed = spec.window is not None
        sliding_window = getattr(module.config, "sliding_window", None) if windowed else None
    check_agrees(layer, spec, scale, sliding_window, softcap, s_aux)
    latent = None if spec.rope is None else Absorbed(module, spec, query.shape[-1])
    step, rows = cache.begin(layer, query, attention_mask, asked.get("position_ids"))
    q = rows.pack(query)
    new = [rows.pack(tensor) for tensor in note.new]
    sinks = None if s_aux is None else s_aux.detach().float()
    out = step.attend(layer, q if latent is None else latent.query(q), *new, sinks=sinks)
    cache.end(layer)
    return rows.unpack(out if latent is None else latent.output(out)), None

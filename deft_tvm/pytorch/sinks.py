"""Attention sinks: a learned logit for each head that takes part in the softmax and has no value.

    out' = out · exp(lse - lse')        lse' = ln(exp(lse) + exp(sink))

(gpt-oss; Xiao et al. 2024 keep real tokens for it.) A sink belongs to a row and not to a set of
tokens, so that states with a sink in them no longer compose. Kernels of a spec with sinks take them
in where a row's states meet; this is for states that meet elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deft_tvm.errors import InputError


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a sink in each head, from attention without. Changes `out` and `lse`.

    Args:
        out: [R, query heads, v_width], as ``merge_states`` returns it.
        lse: [R, query heads], natural logarithm; -inf for a row that sees nothing.
        sinks: [query heads], learned logits in the scale of the scaled scores; -inf for none.

    Returns:
        `out` and `lse`; a row that sees nothing keeps zeros, and its LSE is the sink.

    Raises:
        InputError: `sinks` is not one logit for each query head on the device of `out`.
    """
    if sinks.shape != out.shape[1:2] or sinks.device != out.device:
        raise InputError(
            f"sinks has shape {list(sinks.shape)} on {sinks.device}; expected one logit for each "
            f"of {out.shape[1]} query heads, on {out.device}"
        )
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
    kept = torch.exp(lse - with_sink).nan_to_num_(nan=0.0)  # -inf - -inf: nothing seen, no sink
    return out.mul_(kept.unsqueeze(-1)), lse.copy_(with_sink)

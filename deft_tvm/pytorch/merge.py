"""Merging of attention states: what `deft_tvm` returns with what any other attention does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deft_tvm.errors import InputError


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of tokens, from attention over each.

        L = ln Σ_p exp(L_p)        O = Σ_p exp(L_p - L) O_p

    (DeFT, ICLR 2025, section 3.3; the state operator of FlashInfer, whose LSE has base 2: multiply
    that by ln 2.) Computed in float32, in float64 where `outs` is; differentiable.

    Args:
        outs: [P, R, H, V], normalised outputs over each of P sets; any float dtype.
        lses: [P, R, H], natural logarithm; -inf for a set of which the row sees nothing. The
            output of such a set is not read, so it may hold anything.

    Returns:
        out [R, H, V] in the dtype of `outs`, and lse [R, H] in the dtype of the computation;
        zeros and -inf for a row that sees nothing in any set.

    Raises:
        InputError: there is no set, the shapes do not fit, or a dtype is no float.

    >>> outs, lses = torch.tensor([[[[2.0]]], [[[4.0]]]]), torch.tensor([[[0.0]], [[0.0]]])
    >>> merge_states(outs, lses)  # equal weights; ln 2
    (tensor([[[3.]]]), tensor([[0.6931]]))
    """
    _check(outs, lses)
    compute = torch.promote_types(outs.dtype, torch.float32)
    lses = lses.to(compute)
    largest = lses.amax(0)
    shift = largest.masked_fill(largest == -math.inf, 0.0)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    seen = (lses != -math.inf).unsqueeze(-1)
    summed = (weights.unsqueeze(-1) * outs.to(compute).where(seen, 0.0)).sum(0)
    # Not the logarithm of 0, whose gradient would be NaN times 0.
    divisor = total.masked_fill(total == 0, 1.0)
    out = summed / divisor.unsqueeze(-1)
    return out.to(outs.dtype), (shift + divisor.log()).masked_fill(total == 0, -math.inf)


def _check(outs: Tensor, lses: Tensor) -> None:
    for name, tensor in (("outs", outs), ("lses", lses)):
        if not tensor.is_floating_point():
            raise InputError(f"{name} has dtype {tensor.dtype}; expected a float dtype")
    if outs.dim() < 2 or outs.shape[0] == 0:
        raise InputError(
            f"outs has shape {list(outs.shape)}; expected [P, R, H, V] with one set or more"
        )
    if lses.shape != outs.shape[:-1]:
        raise InputError(
            f"lses has shape {list(lses.shape)}; expected {list(outs.shape[:-1])}, that of outs "
            f"without its width"
        )

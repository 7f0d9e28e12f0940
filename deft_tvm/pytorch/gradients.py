"""No gradient is lost silently: there is no backward, and no derivative forwards.

Tensors say themselves that they require grad. What `torch.func.grad` wraps and what has a tangent
shows where torch would differentiate, at its dispatch key for autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from deft_tvm.errors import InputError


def check_no_gradient(q: Tensor, kv: Sequence[Tensor], **outputs: Tensor | None) -> None:
    """Refuse tensors whose gradient would silently be lost.

    Raises:
        InputError: grad mode is on, and an input or output requires grad.
    """
    if not torch.is_grad_enabled():
        return
    for i, tensor in enumerate((q, *kv)):
        if tensor.requires_grad:
            refuse_gradient(input_name(i))
    for name, output in outputs.items():
        if output is not None and output.requires_grad:
            refuse_gradient(name)


def refuse_gradient(name: str) -> NoReturn:
    raise InputError(
        f"{name} requires grad, and there is no backward; expected torch.no_grad(), "
        f"torch.inference_mode() or {name}.detach()"
    )


def input_name(index: int) -> str:
    """What the tensor of a number is called, where q comes first."""
    return f"kv[{index - 1}]" if index else "q"


def refusing(operator: OpOverload) -> Callable[..., Any]:
    """What `operator` does at autograd's key: it refuses what it would lose, and goes on below."""

    def at_autograd(keys: Any, q: Tensor, kv: Sequence[Tensor], *rest: Any) -> Any:
        check_no_gradient(q, kv, **dict(zip(("out", "lse"), rest[3:], strict=False)))
        _check_no_tangent((q, *kv))
        with torch._C._AutoDispatchBelowAutograd():
            below = keys & torch._C._after_autograd_keyset
            return operator.redispatch(below, q, kv, *rest)

    return at_autograd


def _check_no_tangent(tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise InputError(
                f"{input_name(i)} has a tangent, and there is no derivative forwards; expected "
                f"{input_name(i)}.detach()"
            )

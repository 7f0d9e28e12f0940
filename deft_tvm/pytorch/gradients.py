"""No gradient is lost silently: there is no backward, and no derivative forwards.

What `torch.func` wraps says so before it is dispatched, and no more where the operators run: torch
takes it off there. So a program that was compiled with `torch.func.grad` in it has torch's own
warning alone. A kernel at torch's key for autograd would see it, but cost each call of an operator
as much as all of its checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
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


def named(q: Tensor, kv: Sequence[Tensor], **others: Tensor | None) -> list[tuple[str, Tensor]]:
    """The tensors of a call and what they are called; of `others` those that are given."""
    inputs = [(input_name(i), tensor) for i, tensor in enumerate((q, *kv))]
    return inputs + [(name, tensor) for name, tensor in others.items() if tensor is not None]


def check_no_tangent(q: Tensor, kv: Sequence[Tensor]) -> None:
    """Refuse tensors whose derivative forwards would silently be lost.

    Raises:
        InputError: an input has a tangent.
    """
    for name, tensor in named(q, kv):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise InputError(
                f"{name} has a tangent, and there is no derivative forwards; expected "
                f"{name}.detach()"
            )

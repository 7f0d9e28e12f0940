"""Refusals of tensors: a cheap test for the call, and a sentence where it fails.

Kernels check what they are given too, but neither the page size nor that no gradient is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.pytorch.loaded import Loaded


def check_inputs(
    loaded: Loaded, q: Tensor, kv: Sequence[Tensor], rows: Tensor, paged: bool
) -> None:
    """Refuse q or a cache buffer that does not fit.

    Args:
        loaded: the module; its spec says what fits.
        q: [R, query heads, q_width].
        kv: the buffers, in the order of ``spec.buffers``.
        rows: the plan's ``row_order``, so [R] on the plan's device.
        paged: whether buffers have pages, or tokens.

    Raises:
        InputError: names the tensor, what it is and what was expected.
    """
    check_no_gradient(q, kv)
    spec, device = loaded.spec, rows.device
    expected = (rows.shape[0], spec.num_q_heads, spec.q_width)
    if not (
        q.dtype is loaded.dtype
        and q.shape == expected
        and q.device == device
        and q.stride(2) == 1
    ):
        _refuse("q", q, loaded.dtype, expected, device)
    if len(kv) != len(spec.buffers):
        names = ", ".join(buffer.name for buffer in spec.buffers)
        raise InputError(f"kv has {len(kv)} tensors; expected {len(spec.buffers)}: {names}")
    shapes = loaded.page_shapes if paged else loaded.token_shapes
    for i, (buffer, shape, dtype) in enumerate(
        zip(kv, shapes, loaded.cache_dtypes, strict=True)
    ):
        if not (
            buffer.dtype is dtype
            and buffer.shape[1:] == shape
            and buffer.device == device
            and buffer.stride(-1) == 1
        ):
            first = "pages" if paged else "tokens"
            _refuse(f"kv[{i}] ({spec.buffers[i].name})", buffer, dtype, (first, *shape), device)


def check_outputs(loaded: Loaded, out: Tensor, lse: Tensor, rows: Tensor) -> None:
    """Refuse outputs that kernels cannot write to.

    Raises:
        InputError: names the tensor, what it is and what was expected.
    """
    spec = loaded.spec
    expected = (rows.shape[0], spec.num_q_heads)
    for name, tensor, dtype, shape in (
        ("out", out, loaded.dtype, (*expected, spec.v_width)),
        ("lse", lse, torch.float32, expected),
    ):
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != rows.device:
            _refuse(name, tensor, dtype, shape, rows.device)
        if not tensor.is_contiguous():
            raise InputError(f"{name} has strides {tensor.stride()}; expected it contiguous")


def check_no_gradient(q: Tensor, kv: Sequence[Tensor]) -> None:
    """Refuse inputs whose gradient would silently be lost.

    Raises:
        InputError: grad mode is on, and an input requires grad.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("q", q), *((f"kv[{i}]", buffer) for i, buffer in enumerate(kv))):
        if tensor.requires_grad:
            raise InputError(
                f"{name} requires grad, and there is no backward; expected torch.no_grad(), "
                f"torch.inference_mode() or {name}.detach()"
            )


def check_extent(kv: Sequence[Tensor], needed: int, paged: bool) -> None:
    """Refuse a cache that lacks pages (or tokens) that the plan reads.

    Raises:
        InputError: names the buffer, its size, and what the plan needs.
    """
    for i, buffer in enumerate(kv):
        if buffer.dim() == 4 - (not paged) and buffer.shape[0] >= needed:
            continue
        if buffer.dim() != 4 - (not paged):
            expected = "4, [pages, ...]" if paged else "3, [tokens, heads, width]: no page_indices"
            raise InputError(f"kv[{i}] has {buffer.dim()} dimensions; expected {expected}")
        if paged:
            raise InputError(
                f"page {needed - 1} of page_indices is out of range: kv[{i}] has "
                f"{buffer.shape[0]} pages; expected {needed} or more"
            )
        raise InputError(
            f"kv[{i}] has {buffer.shape[0]} tokens; expected {needed} or more, as the forest has"
        )


def _refuse(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int | str],
    device: torch.device,
) -> NoReturn:
    """Say the first thing that is wrong with `tensor`; a word in `shape` stands for any size."""
    found = list(tensor.shape)
    fits = len(found) == len(shape) and all(
        isinstance(wanted, str) or wanted == size
        for size, wanted in zip(found, shape, strict=True)
    )
    if tensor.dtype is not dtype:
        raise InputError(f"{name} has dtype {_short(tensor.dtype)}; expected {_short(dtype)}")
    if not fits:
        raise InputError(f"{name} has shape {found}; expected [{', '.join(map(str, shape))}]")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}; expected {device}, where the plan is")
    raise InputError(f"{name} has strides {tensor.stride()}; expected 1 as the last")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

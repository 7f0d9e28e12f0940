"""Refusals of tensors and of plans: a cheap test in every call, and a sentence where it fails.

Kernels check what they are given too, but not the page size, nor whether pages exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from deft_tvm.errors import InputError, PlanError
from deft_tvm.plan import Plan
from deft_tvm.pytorch.gradients import named, refuse_gradient
from deft_tvm.pytorch.loaded import Loaded
from deft_tvm.pytorch.plan_tensors import PlanTensors
from deft_tvm.spec import AttentionSpec, TileShape


def check_plan(spec: AttentionSpec, tiles: tuple[TileShape, ...], plan: Plan) -> None:
    """Refuse a plan that kernels would follow out of the bounds of an item or of a page.

    Raises:
        PlanError: the plan is not for `spec` and the module's `tiles`.
    """
    if plan.tiles != tiles:
        raise PlanError(
            f"plan has tile classes {[tile.name for tile in plan.tiles]}; expected those of "
            f"the module, {[tile.name for tile in tiles]}"
        )
    if plan.group != spec.group:
        raise PlanError(f"plan has group {plan.group}; expected the spec's, {spec.group}")
    if plan.window != spec.window:
        raise PlanError(f"plan has window {plan.window}; expected the spec's, {spec.window}")
    if not plan.pages.is_contiguous and plan.page_size != spec.page_size:
        raise PlanError(
            f"plan has page_size {plan.page_size}; expected the spec's, {spec.page_size}"
        )


def check_types(
    spec: AttentionSpec,
    q: Tensor,
    kv: Sequence[Tensor],
    sinks: Tensor | None,
    **outputs: Tensor | None,
) -> None:
    """Refuse what torch would refuse by printing all of it, and sinks that do not fit the spec.

    Raises:
        InputError: `q` or an output is no tensor, or `kv` no tuple of tensors; `sinks` are there
            or not, and the spec says otherwise.
    """
    if spec.sinks is (sinks is None):
        given, wanted = ("None", "a tensor") if sinks is None else ("given", "none")
        raise InputError(
            f"sinks is {given}; expected {wanted}, since the spec has sinks={spec.sinks}"
        )
    if isinstance(kv, Tensor) or not isinstance(kv, Sequence):
        given = "one tensor" if isinstance(kv, Tensor) else type(kv).__name__
        raise InputError(f"kv is {given}; expected a tuple of tensors, such as kv.unbind()")
    for name, tensor in named(q, kv, sinks=sinks, **outputs):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is {type(tensor).__name__}; expected a torch.Tensor")
    if sinks is not None and sinks.requires_grad and torch.is_grad_enabled():
        refuse_gradient("sinks")
    if len(kv) != len(spec.buffers) + len(spec.scaled):
        _refuse_number(_cache_names(spec), kv)


def check_inputs(loaded: Loaded, step: PlanTensors, q: Tensor, kv: Sequence[Tensor]) -> None:
    """Refuse q or a cache buffer that does not fit the module's spec or the plan.

    Raises:
        InputError: names the tensor, what it is and what was expected.
    """
    device, wanted = step.device, (step.rows, *loaded.q_shape)
    if not (
        q.shape == wanted and q.dtype is loaded.dtype and q.device == device and q.stride()[-1] == 1
    ):
        _refuse("q", q, loaded.dtype, wanted, device)
    if len(kv) != loaded.tensors:
        _refuse_number([*_cache_names(loaded.spec), *["sinks"] * loaded.spec.sinks], kv)
    shapes = loaded.page_shapes if step.paged else loaded.token_shapes
    for buffer, shape, dtype in zip(kv, shapes, loaded.cache_dtypes, strict=False):
        sizes = buffer.shape
        if not (
            sizes[1:] == shape
            and buffer.dtype is dtype
            and sizes[0] >= step.needed
            and buffer.device == device
            and buffer.stride()[-1] == 1
        ):
            _refuse_cache(loaded, step, kv, device)
    for scales, number in loaded.scaled:
        pages, heads = kv[number].shape[0] if step.paged else 1, loaded.spec.buffers[number].heads
        given, fitting = kv[scales], ((heads,), (pages, heads))
        if given.shape not in fitting or not _is_float32(given, device):
            name = f"kv[{scales}] (scales of {loaded.spec.buffers[number].name})"
            _refuse(name, given, torch.float32, fitting[given.dim() == 2], device)
    if loaded.spec.sinks:
        sinks, one_a_head = kv[-1], loaded.q_shape[:1]
        fits = sinks.shape == one_a_head and _is_float32(sinks, device)
        if not (fits and sinks.is_contiguous()):
            _refuse("sinks", sinks, torch.float32, one_a_head, device)


def _is_float32(tensor: Tensor, device: torch.device) -> bool:
    return tensor.dtype is torch.float32 and tensor.device == device


def _cache_names(spec: AttentionSpec) -> list[str]:
    """What a layer's cache is made of: its buffers, and the scales of those in 8 bits."""
    names = [buffer.name for buffer in spec.buffers]
    return names + [f"scales of {spec.buffers[number].name}" for number in spec.scaled]


def _refuse_number(names: Sequence[str], kv: Sequence[Tensor]) -> NoReturn:
    raise InputError(f"kv has {len(kv)} tensors; expected {len(names)}: {', '.join(names)}")


PAIR_BYTES = 4
"""Of two elements of 16 bits."""


def check_outputs(loaded: Loaded, step: PlanTensors, out: Tensor, lse: Tensor) -> None:
    """Refuse outputs that kernels cannot write to.

    Raises:
        InputError: names the tensor, what it is and what was expected.
    """
    shape = (step.rows, *loaded.partial_shape)
    for name, tensor, dtype, expected in (
        ("out", out, loaded.dtype, shape),
        ("lse", lse, torch.float32, shape[:2]),
    ):
        if tensor.shape != expected or tensor.dtype is not dtype or tensor.device != step.device:
            _refuse(name, tensor, dtype, expected, step.device)
        if not tensor.is_contiguous():
            raise InputError(f"{name} has strides {tensor.stride()}; expected it contiguous")
        if not tensor.is_cpu and tensor.data_ptr() % PAIR_BYTES:
            raise InputError(
                f"{name} begins {tensor.data_ptr() % PAIR_BYTES} bytes after a multiple of "
                f"{PAIR_BYTES}; expected it at one, as a GPU writes elements in pairs"
            )


def check_dense(q: Tensor, kv: Sequence[Tensor], **outputs: Tensor | None) -> None:
    """Refuse tensors whose elements do not lie at strides, to which kernels have no address.

    Raises:
        InputError: one is sparse, nested or quantized.
    """
    for name, tensor in named(q, kv, **outputs):
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            what = "nested" if tensor.is_nested else _short(tensor.layout)
            what = _short(tensor.dtype) if tensor.is_quantized else what
            raise InputError(f"{name} is {what}; expected a dense tensor")


def check_devices(device: torch.device, *tensors: Tensor) -> None:
    """Refuse a call that mixes devices, of which torch would run the one that has no data.

    Raises:
        InputError: a tensor is not on `device`, where the plan is.
    """
    for tensor in tensors:
        if tensor.device != device:
            raise InputError(
                f"a tensor {list(tensor.shape)} is on {tensor.device}; expected {device}, where "
                f"the plan is"
            )


def _refuse_cache(
    loaded: Loaded, step: PlanTensors, kv: Sequence[Tensor], device: torch.device
) -> None:
    """Find the buffer that does not fit, and say why."""
    unit = "pages" if step.paged else "tokens"
    shapes = loaded.page_shapes if step.paged else loaded.token_shapes
    for i, (buffer, shape) in enumerate(zip(kv, shapes, strict=False)):
        name = f"kv[{i}] ({loaded.spec.buffers[i].name})"
        fits = buffer.shape[1:] == shape and buffer.dtype is loaded.cache_dtypes[i]
        if not fits or buffer.device != device or buffer.stride(-1) != 1:
            _refuse(name, buffer, loaded.cache_dtypes[i], (unit, *shape), device)
        if buffer.shape[0] < step.needed:
            page = f"page {step.needed - 1} of page_indices is out of range: "
            raise InputError(
                f"{page if step.paged else ''}{name} has {buffer.shape[0]} {unit}; "
                f"expected {step.needed} or more"
            )


def _refuse(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int | str],
    device: torch.device,
) -> NoReturn:
    """Say the first thing that is wrong with `tensor`; a word in `shape` stands for any size."""
    sizes = list(tensor.shape)
    if tensor.dtype is not dtype:
        raise InputError(f"{name} has dtype {_short(tensor.dtype)}; expected {_short(dtype)}")
    if len(sizes) != len(shape) or any(
        isinstance(wanted, int) and wanted != size
        for size, wanted in zip(sizes, shape, strict=True)
    ):
        raise InputError(f"{name} has shape {sizes}; expected [{', '.join(map(str, shape))}]")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}; expected {device}, where the plan is")
    raise InputError(f"{name} has strides {tensor.stride()}; expected 1 as the last")


def _short(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")

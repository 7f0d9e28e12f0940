"""Refusals of what is no attention: the fields of a spec, one by one and beside each other."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, get_args

from deft_tvm.arrays import whole
from deft_tvm.dtypes import DTYPE_BYTES, FP8, Dtype, Layout
from deft_tvm.errors import SpecError

if TYPE_CHECKING:
    from deft_tvm.spec import AttentionSpec


def check(spec: AttentionSpec) -> None:
    """Settle the types of a spec's numbers, and refuse fields that are out of range or do not fit.

    Raises:
        SpecError: names the field, what it is and what was expected.
    """
    _check_numbers(spec)
    _check_heads(spec)
    _check_regions(spec)
    _check_storage(spec)


def _check_numbers(spec: AttentionSpec) -> None:
    """Refuse what is no number, and make one kind of all, so that equal specs are spelled alike."""
    for name in ("num_q_heads", "num_kv_heads", "page_size", "window"):
        value = getattr(spec, name)
        if value is not None or name != "window":
            object.__setattr__(spec, name, whole(name, value, SpecError))
    for name in ("scale", "soft_cap"):
        value = getattr(spec, name)
        if value is None and name == "soft_cap":
            continue
        try:
            object.__setattr__(spec, name, float(value))
        except (TypeError, ValueError):
            raise SpecError(f"{name} is {value!r}; expected a number") from None
    for number, buffer in enumerate(spec.buffers):
        if not re.fullmatch(r"\w+", buffer.name):
            raise SpecError(
                f"buffers[{number}] is named {buffer.name!r}; expected letters, digits or _"
            )
        for name in ("heads", "width"):
            if whole(f"buffers[{number}].{name}", getattr(buffer, name), SpecError) < 1:
                raise SpecError(
                    f"buffers[{number}] ({buffer.name}) has {name} {getattr(buffer, name)}; "
                    f"expected 1 or more"
                )
    for name, region in (("k", spec.k), ("v", spec.v)):
        for field in ("buffer", "begin", "end"):
            whole(f"{name}.{field}", getattr(region, field), SpecError)


def _check_heads(spec: AttentionSpec) -> None:
    for name in ("num_q_heads", "num_kv_heads"):
        value = getattr(spec, name)
        if value < 1:
            raise SpecError(f"{name} is {value}; expected 1 or more")
    if spec.num_q_heads % spec.num_kv_heads:
        raise SpecError(
            f"num_q_heads is {spec.num_q_heads}; expected a multiple of "
            f"num_kv_heads, which is {spec.num_kv_heads}"
        )


def _check_regions(spec: AttentionSpec) -> None:
    for name, region in (("k", spec.k), ("v", spec.v)):
        if not 0 <= region.buffer < len(spec.buffers):
            raise SpecError(f"{name}.buffer is {region.buffer}; there are {len(spec.buffers)}")
        buffer = spec.buffers[region.buffer]
        if not 0 <= region.begin < region.end <= buffer.width:
            raise SpecError(
                f"{name} is columns {region.begin} to {region.end}; "
                f"expected a part of buffer {buffer.name!r}, which is {buffer.width} wide"
            )
        if buffer.heads != spec.num_kv_heads:
            raise SpecError(
                f"buffer {buffer.name!r} has {buffer.heads} heads; "
                f"expected num_kv_heads, which is {spec.num_kv_heads}"
            )
    inside = spec.v.begin <= spec.k.begin and spec.k.end <= spec.v.end
    if spec.tied and not inside:
        raise SpecError(f"k {spec.k} and v {spec.v} overlap in part; expected k inside v, or apart")
    if spec.rope is not None and not 0 <= spec.rope < len(spec.buffers):
        raise SpecError(f"rope is buffer {spec.rope}; there are {len(spec.buffers)}")
    if spec.rope is not None and spec.buffers[spec.rope].heads not in (1, spec.num_kv_heads):
        raise SpecError(
            f"the rope buffer has {spec.buffers[spec.rope].heads} heads; "
            f"expected 1 or num_kv_heads, which is {spec.num_kv_heads}"
        )


def _check_storage(spec: AttentionSpec) -> None:
    if spec.page_size < 1 or spec.page_size & (spec.page_size - 1):
        raise SpecError(f"page_size is {spec.page_size}; expected a power of two")
    if spec.layout not in get_args(Layout):
        raise SpecError(f"layout is {spec.layout!r}; expected 'NHD' or 'HND'")
    rope = [] if spec.rope is None else [("rope", spec.buffers[spec.rope].dtype)]
    for name, dtype in (("dtype", spec.dtype), *rope):
        if dtype not in get_args(Dtype):
            raise SpecError(f"{name} is {dtype!r}; expected one of {', '.join(get_args(Dtype))}")
    for buffer in spec.buffers:
        if buffer.dtype not in DTYPE_BYTES:
            raise SpecError(
                f"buffer {buffer.name!r} has dtype {buffer.dtype!r}; expected one of "
                f"{', '.join(DTYPE_BYTES)}"
            )
    k, v = spec.buffers[spec.k.buffer], spec.buffers[spec.v.buffer]
    if k.scaled != v.scaled:
        raise SpecError(f"K is {k.dtype} and V {v.dtype}; expected both of them in {FP8}, or none")
    if spec.window is not None and spec.window < 1:
        raise SpecError(f"window is {spec.window}; expected 1 or more tokens, or None")
    for name, value in (("scale", spec.scale), ("soft_cap", spec.soft_cap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpecError(f"{name} is {value}; expected a finite number above zero")

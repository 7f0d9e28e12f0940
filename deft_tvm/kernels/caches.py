"""How the buffers of a cache lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import FP8_BITS
from deft_tvm.spec import CacheBuffer


def element_of(buffer: CacheBuffer) -> str:
    """The type of its elements for TVM, which has none of 8 bits."""
    return FP8_BITS if buffer.scaled else buffer.dtype


def shape_of(layout: str) -> Callable[..., tuple[Any, ...]]:
    """Of pages, page size, heads and width."""
    if layout == "NHD":
        return lambda pages, page, heads, width: (pages, page, T.int64(heads), T.int64(width))
    return lambda pages, page, heads, width: (pages, T.int64(heads), page, T.int64(width))


def index_of(layout: str) -> Callable[..., Expr]:
    """The element of a page, slot, head and column."""
    if layout == "NHD":
        return lambda cache, page, slot, head, d: cache[page, slot, head, d]
    return lambda cache, page, slot, head, d: cache[page, head, slot, d]

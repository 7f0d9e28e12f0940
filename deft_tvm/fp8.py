"""Caches in 8 bits: rounding to e4m3 with a scale, and back."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from deft_tvm.dtypes import Layout
from deft_tvm.errors import InputError

MOST = torch.finfo(torch.float8_e4m3fn).max
"""448, the largest element."""
TINY = torch.finfo(torch.float32).tiny


def quantize(cache: Tensor, *, layout: str = "NHD", by_page: bool = False) -> tuple[Tensor, Tensor]:
    """A cache in e4m3, with the smallest scales under which every element fits.

    Args:
        cache: [pages, page_size, heads, width], in layout ``HND`` [pages, heads, page_size, width],
            or [tokens, heads, width]; any float type. NaN, as in slots that hold no token, stays
            NaN and does not count.
        layout: ``NHD`` or ``HND``; a cache without pages has but one.
        by_page: a scale for each page and head, which later tokens of other pages do not change;
            else one for each head.

    Returns:
        The cache in ``torch.float8_e4m3fn``, and its scales: float32[heads], or with `by_page`
        float32[pages, heads]. An element is about what is stored, times its scale.

    Raises:
        InputError: `cache` has no such shape, or `by_page` and it has no pages; an element is
            infinite; there is no such layout.
    """
    heads = _head_axis(cache, layout)
    if cache.dim() not in (3, 4) or (by_page and cache.dim() == 3):
        wanted = "[pages, page_size, heads, width]" + ("" if by_page else " or one dimension less")
        raise InputError(f"cache has shape {list(cache.shape)}; expected {wanted}")
    kept = (0, heads) if by_page else (heads,)
    others = [axis for axis in range(cache.dim()) if axis not in kept]
    values = cache.float()
    sizes = values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).abs()
    shape = [size if axis in kept else 1 for axis, size in enumerate(cache.shape)]
    largest = sizes.amax(others, keepdim=True) if values.numel() else sizes.new_zeros(shape)
    if bool(largest.isinf().any()):
        raise InputError("cache has infinite elements; expected finite ones, or NaN")
    # Not below the normal numbers, where dividing by it would lose what it should keep.
    scale = torch.where(largest > 0, (largest / MOST).clamp(min=TINY), 1.0)
    # Rounding of the quotient may leave it above the largest element, which would become NaN.
    stored = (values / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
    return stored, scale.squeeze(others)


def dequantize(stored: Tensor, scales: Tensor, *, layout: str = "NHD") -> Tensor:
    """The elements that a cache in e4m3 stands for, in the scales' type; exact in float64.

    Args:
        stored: a cache, as in `quantize`.
        scales: float[heads] or float[pages, heads].
        layout: ``NHD`` or ``HND``.

    Raises:
        InputError: there is no such layout.
    """
    shape = [1] * stored.dim()
    shape[_head_axis(stored, layout)] = scales.shape[-1]
    if scales.dim() == 2:
        shape[0] = scales.shape[0]
    return stored.to(scales.dtype) * scales.view(shape)


def _head_axis(cache: Tensor, layout: str) -> int:
    if layout not in get_args(Layout):
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(get_args(Layout))}")
    return 1 if cache.dim() == 4 and layout == "HND" else cache.dim() - 2

"""Element types of queries and caches, their sizes and short names, and how pages lie."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
CacheDtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]
Layout = Literal["NHD", "HND"]

FP8: Literal["float8_e4m3fn"] = "float8_e4m3fn"
"""Cached elements in 8 bits (Micikevicius et al., arXiv 2209.05433): 4 of exponent, 3 of mantissa,
no infinity, at most 448; a float32 scale for each head, or page and head, stands beside them."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, FP8: 1}
SHORT_DTYPE: dict[str, str] = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", FP8: "e4m3"
}  # fmt: skip
LONG_DTYPE: dict[str, str] = {short: long for long, short in SHORT_DTYPE.items()}

"""How wide the vectors of a target are."""

from __future__ import annotations

from collections.abc import Set


def float_lanes(features: Set[str]) -> int:
    """float32 elements in a vector register."""
    if "avx512f" in features:
        return 16
    return 8 if "avx2" in features else 4


def registers(features: Set[str]) -> int:
    """Vector registers that a kernel can count on."""
    return 16 if "avx2" in features and "avx512f" not in features else 32

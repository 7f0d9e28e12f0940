"""How wide the vectors of a target are."""

from __future__ import annotations

from collections.abc import Set

REGISTERS = "global.registers"
"""The scope of tiles that must stay in registers. TVM lets buffers of one scope share memory whose
lifetimes are apart, and what shares an address with a longer-lived buffer LLVM stores back at every
step (the output's product of 32 lane rows takes twice its time so)."""


def float_lanes(features: Set[str]) -> int:
    """float32 elements in a vector register."""
    if "avx512f" in features:
        return 16
    return 8 if "avx2" in features else 4


def registers(features: Set[str]) -> int:
    """Vector registers that a kernel can count on."""
    return 16 if "avx2" in features and "avx512f" not in features else 32

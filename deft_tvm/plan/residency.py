"""What one unit of work takes of a GPU's shared memory, and by which instructions it is multiplied.

Plans and schedules must agree on both, and ask here.
"""

from __future__ import annotations

from collections.abc import Collection

from deft_tvm.dtypes import DTYPE_BYTES, Dtype
from deft_tvm.spec import AttentionSpec, TileShape

TABLES_BYTES = 16384
"""More than the tables of tokens and rows ever take beside the tiles."""
PADDING = 16
"""Bytes after each row of a tile, so that equal columns of neighbouring rows lie in other banks."""


def unit_bytes(spec: AttentionSpec, tile: TileShape, stages: int, padding: int = PADDING) -> int:
    """Shared memory that a unit takes at most, K and V `stages` times.

    Args:
        spec: the attention.
        tile: the tile class.
        stages: tiles of K, V and rope that are held at once.
        padding: bytes after each row of a tile.
    """
    element = DTYPE_BYTES[tile.operand]
    k_width = 0 if spec.tied else spec.k_width
    widths = [width for width in (k_width, spec.v_width, spec.rope_width) if width]
    token = sum(width * element + padding for width in widths)
    row = spec.q_width * element + 2 * padding + tile.kv_tile * element
    return tile.lane_rows * row + stages * tile.kv_tile * token + TABLES_BYTES


GROUP_ARCH = "sm_90a"
"""Of Hopper, whose warps can multiply in groups of four."""
GROUP_ROWS = 64
PANEL = 64
"""Columns of a panel, in which tiles then lie: 128 bytes of 16-bit elements."""


def can_group(spec: AttentionSpec, operand: Dtype, archs: Collection[str]) -> bool:
    """Whether warps that have `GROUP_ROWS` of a tile of `operand` can multiply them as one.

    They can only where a tile is whole panels, of elements that are cached in the operand's type.

    Args:
        spec: the attention.
        operand: the type of the products' factors.
        archs: that binaries may be of.
    """
    widths = [spec.k_width, spec.v_width, spec.rope_width]
    if spec.tied:
        widths.append(spec.k.begin - spec.v.begin)
    return (
        GROUP_ARCH in archs
        and operand == spec.dtype != "float32"
        and all(buffer.dtype == operand for buffer in spec.buffers)
        and all(width % PANEL == 0 for width in widths)
    )

"""What schedules with query rows in the vector lanes share: transposed tiles, and passes over them.

Every tile is kept transposed, Sᵀ[token, row] and Oᵀ[dim, row], so that the softmax's maximum, sum
and rescale run across lanes with no horizontal step. Only Q is transposed at the start of an item
and the output at its end.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.blocks import matrices_of_softmax
from deft_tvm.schedules.cpu.blocks import load_widths
from deft_tvm.schedules.cpu.instructions import narrow_pairs
from deft_tvm.schedules.verbs import (
    power_of_two_in,
    reduce_in_lanes,
    swap,
    vectorize_last,
    vectorize_over,
)
from deft_tvm.spec import AttentionSpec

TRANSPOSED = (
    "init_out",
    "scores",
    "masked_logits",
    "fold",
    "accumulate",
)
ROW_VECTORS = (
    "init_max",
    "init_sum",
    "new_max",
    "rescale",
    "new_sum",
    "keep_max",
    "keep_sum",
    "normalise",
)
TILE_PASSES = ("init_out", "logits", "masked_logits", "keep_out")


def transpose(sch: Schedule, spec: AttentionSpec, paired: bool) -> None:
    """Transpose every tile; `paired`: neighbours of a reduction stand beside each other."""
    for block in (*TRANSPOSED, *matrices_of_softmax(spec)):
        sch.transform_layout(sch.get_sblock(block), ("write", 0), swap)
    factors = ["load_q", "probabilities"]
    if spec.rope is not None:
        sch.transform_layout(sch.get_sblock("scores_rope"), ("write", 0), swap)
        factors.append("load_q_rope")
    for block in factors:
        layout = pairs_of_second if paired else swap
        sch.transform_layout(sch.get_sblock(block), ("write", 0), layout)


def pairs_of_second(i: Any, d: Any) -> tuple[Any, Any, Any]:
    """[row, d] → [d / 2, row, d % 2]: two neighbours of the reduction beside each other."""
    return d // 2, i, d % 2


def pass_over_rows(sch: Schedule, spec: AttentionSpec, lanes: int) -> None:
    """All that is one pass a tile: rows in lanes, and the loads along their own rows."""
    for block in (*TILE_PASSES, *matrices_of_softmax(spec)):
        vectorize_over(sch, block, 0, lanes)
    for block in ROW_VECTORS:
        vectorize_last(sch, block, lanes)
    for block in ("row_max", "row_sum"):
        reduce_in_lanes(sch, block, lanes)
    # Tiles of K and V are packed out of their pages: in NHD the token stride is a multiple of
    # 4 KiB for common shapes, and a tile read in place would fall into a few sets of the cache.
    for block, width in {**load_widths(spec), "write_out": spec.v_width}.items():
        vectorize_last(sch, block, power_of_two_in(width, lanes))


def narrow_in_pairs(sch: Schedule) -> None:
    """Probabilities of two tokens rounded and interleaved at once."""
    i, j = sch.get_loops(sch.get_sblock("probabilities"))[-2:]
    j_outer, j_pair = sch.split(j, [None, 2])
    i_outer, i_lanes = sch.split(i, [None, 16])
    sch.reorder(j_outer, i_outer, j_pair, i_lanes)
    sch.tensorize(j_pair, narrow_pairs())

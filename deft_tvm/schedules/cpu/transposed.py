"""What schedules with query rows in the vector lanes share: transposed tiles, and passes over them.

Every tile is kept transposed, Sᵀ[token, row] and Oᵀ[dim, row], so that the softmax's maximum, sum
and rescale run across lanes with no horizontal step. Only Q is transposed at the start of an item
and the output at its end, in registers.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from deft_tvm.schedules.blocks import matrices_of_softmax
from deft_tvm.schedules.cpu.blocks import load_widths, query_widths
from deft_tvm.schedules.cpu.instructions import narrow_pairs
from deft_tvm.schedules.cpu.pairs import pairs_of_second
from deft_tvm.schedules.cpu.trimmed import over_rows
from deft_tvm.schedules.cpu.turns import turn_lanes, turn_rows, whole_blocks
from deft_tvm.schedules.cpu.vector import REGISTERS
from deft_tvm.schedules.verbs import (
    power_of_two_in,
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


def transpose(sch: Schedule, spec: AttentionSpec, lanes: int, paired: bool) -> None:
    """Transpose every tile; `paired`: neighbours of a reduction stand beside each other."""
    for block in (*TRANSPOSED, *matrices_of_softmax(spec)):
        sch.transform_layout(sch.get_sblock(block), ("write", 0), swap)
    if spec.rope is not None:
        sch.transform_layout(sch.get_sblock("scores_rope"), ("write", 0), swap)
    layout = pairs_of_second if paired else swap
    sch.transform_layout(sch.get_sblock("probabilities"), ("write", 0), layout)
    for block, width in query_widths(spec).items():
        _load_queries(sch, block, width, lanes, paired)


def pass_over_rows(sch: Schedule, spec: AttentionSpec, lane_rows: int, lanes: int) -> None:
    """All that is one pass a tile: rows in lanes, and the loads along their own rows."""
    over = [vectorize_over(sch, block, 0, lanes) for block in TILE_PASSES]
    over += [vectorize_over(sch, block, 0, lanes) for block in matrices_of_softmax(spec)]
    over += [vectorize_last(sch, block, lanes) for block in ROW_VECTORS]
    over += [_reduce_in_lanes(sch, block, lanes) for block in ("row_max", "row_sum")]
    # Tiles of K and V are packed out of their pages: in NHD the token stride is a multiple of
    # 4 KiB for common shapes, and a tile read in place would fall into a few sets of the cache.
    for block, width in load_widths(spec).items():
        vectorize_last(sch, block, power_of_two_in(width, lanes))
    if whole_blocks(spec.v_width, lanes, paired=False):
        over.append(turn_lanes(sch, "write_out", "A", lanes))
    else:
        vectorize_last(sch, "write_out", power_of_two_in(spec.v_width, lanes))
        over.append(sch.get_loops(sch.get_sblock("write_out"))[-3])
    over += [sch.get_loops(sch.get_sblock("write_lse"))[-1]]
    for loop in over:
        over_rows(sch, loop, lane_rows)


def _load_queries(sch: Schedule, block: str, width: int, lanes: int, paired: bool) -> None:
    """Rows of queries into lanes, in whole blocks where there are such."""
    load = sch.get_sblock(block)
    lane_rows = int(sch.get(sch.get_loops(load)[-2]).extent)
    of_32_bits = paired or sch.get(load).writes[0].source.dtype == "float32"
    if of_32_bits and whole_blocks(width, lanes, paired):
        rows = turn_rows(sch, block, lanes, paired)
    else:
        sch.transform_layout(load, ("write", 0), pairs_of_second if paired else swap)
        vectorize_last(sch, block, power_of_two_in(width, lanes))
        rows = sch.get_loops(load)[-3]
    over_rows(sch, rows, lane_rows)


def narrow_in_pairs(sch: Schedule) -> None:
    """Probabilities of two tokens rounded and interleaved at once."""
    i, j = sch.get_loops(sch.get_sblock("probabilities"))[-2:]
    lane_rows = int(sch.get(i).extent)
    j_outer, j_pair = sch.split(j, [None, 2])
    i_outer, i_lanes = sch.split(i, [None, 16])
    sch.reorder(j_outer, i_outer, j_pair, i_lanes)
    sch.tensorize(j_pair, narrow_pairs())
    over_rows(sch, i_outer, lane_rows)


def _reduce_in_lanes(sch: Schedule, block: str, lanes: int) -> LoopRV:
    """Reduce over the last loop with the one before it in vector lanes, in registers.

    for i, j: m[i] = max(m[i], X[j, i])   →   for i/lanes: v = max over j of X[j, i : i + lanes]

    Returns:
        The loop over vectors.
    """
    reduction = sch.get_sblock(block)
    kept, reduced = sch.get_loops(reduction)[-2:]
    outer, inner = sch.split(kept, [None, lanes])
    sch.reorder(outer, reduced, inner)
    result = sch.cache_write(reduction, 0, REGISTERS)
    sch.reverse_compute_at(result, outer)
    sch.vectorize(inner)
    sch.decompose_reduction(reduction, reduced)
    sch.vectorize(sch.get_loops(result)[-1])
    return outer

"""Many rows on a CPU with AMX: both products in its tile registers.

Tiles are transposed (see `transposed`): a tile of K as it was loaded is the left factor of Sᵀ, and
Q, whose neighbouring dims stand in pairs, the right one. For Oᵀ the left factor is V transposed, 16
dims × 32 tokens at a time, and the probabilities of two tokens in pairs are the right one.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.blocks import score_products
from deft_tvm.schedules.cpu.amx import AMX_LLVM, DEPTH, EDGE
from deft_tvm.schedules.cpu.blocks import asked_beside
from deft_tvm.schedules.cpu.instructions import BFLOAT16_LLVM
from deft_tvm.schedules.cpu.tile_intrinsics import (
    enter_tiles,
    leave_tiles,
    tile_products,
    tile_sums,
    tile_zeros,
    transpose_tokens,
)
from deft_tvm.schedules.cpu.transposed import narrow_in_pairs, pass_over_rows, transpose
from deft_tvm.schedules.cpu.trimmed import over_rows
from deft_tvm.schedules.cpu.turns import turns_llvm
from deft_tvm.schedules.cpu.vector import float_lanes
from deft_tvm.schedules.rule import Knobs, PartialTask
from deft_tvm.schedules.verbs import divisors, import_llvm, spread, swap, vectorize_over


def rows_in_tiles(task: PartialTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: partial kernels of bfloat16 whose tiles are whole AMX tiles."""
    if not _accepts(task):
        return False
    spec, tile, lanes = task.spec, task.tile, float_lanes(task.features)
    sizes = {
        "score_rows": tile.lane_rows,
        "score_tokens": tile.kv_tile,
        "out_rows": tile.lane_rows,
        "out_dims": spec.v_width,
    }
    # Two tiles each way take four loads for four products; one each way takes two for one.
    score_rows, score_tokens, out_rows, out_dims = (
        _Block(sch, extent, knobs.pick_parts(name, extent, choices, choices[-1]))
        for name, extent in sizes.items()
        for choices in (divisors(extent, (EDGE, 2 * EDGE)),)
    )

    transpose(sch, spec, lanes, paired=True)
    for product in score_products(spec):
        _product(sch, product, score_tokens, score_rows, asked_beside(spec, product))
    _transpose_values(sch)
    _product(sch, "accumulate", out_dims, out_rows, "ahead_v", consumer="fold")
    vectorize_over(sch, "fold", 0, lanes)

    pass_over_rows(sch, spec, tile.lane_rows, lanes)
    narrow_in_pairs(sch)
    for block, intrinsic in (("enter", enter_tiles()), ("leave", leave_tiles())):
        sch.tensorize(sch.get_loops(sch.get_sblock(block))[-1], intrinsic)
    import_llvm(sch, "item", BFLOAT16_LLVM + AMX_LLVM + turns_llvm(lanes))
    return True


def _accepts(task: PartialTask) -> bool:
    spec, tile = task.spec, task.tile
    return (
        tile.operand == "bfloat16"
        and {"amx-bf16", "avx512bf16"} <= task.features
        and all(width % EDGE == 0 for width in (tile.lane_rows, spec.v_width))
        and all(width % DEPTH == 0 for width in (tile.kv_tile, spec.k_width, spec.rope_width))
    )


class _Block:
    """One way of a block of tiles: how many blocks there are, as sampled, and what one holds."""

    def __init__(self, sch: Schedule, extent: int, parts: Any) -> None:
        self.parts = parts
        self.size = extent // int(sch.get(parts))


def _product(
    sch: Schedule,
    name: str,
    deep: _Block,
    rows: _Block,
    ahead: str | None,
    consumer: str | None = None,
) -> None:
    """One of the two products in blocks of tiles, the reduction outside them.

    for i, j, k: C[j, i] += …
    → for i/rows, j/deep:  zeros;  for k/32: products;  C[…] = sums;  what consumes them
    """
    block = sch.get_sblock(name)
    i, j, k = sch.get_loops(block)[-3:]
    lane_rows = int(sch.get(i).extent)
    j_outer, j_tile = sch.split(j, [deep.parts, None])
    i_outer, i_tile = sch.split(i, [rows.parts, None])
    k_outer, k_tile = sch.split(k, [None, DEPTH])
    sch.reorder(i_outer, j_outer, k_outer, j_tile, i_tile, k_tile)
    if ahead is not None:
        i_outer, j_outer = spread(sch, ahead, (i_outer, j_outer), (rows.parts, deep.parts))
    sums = sch.cache_write(block, 0, "global")
    sch.reverse_compute_at(sums, j_outer)
    if consumer is not None:
        sch.reverse_compute_at(sch.get_sblock(consumer), j_outer)
    zeros = sch.decompose_reduction(block, k_outer)
    sch.tensorize(sch.get_loops(zeros)[-2], tile_zeros(deep.size, rows.size))
    sch.tensorize(j_tile, tile_products(deep.size, rows.size))
    sch.tensorize(sch.get_loops(sums)[-2], tile_sums(deep.size, rows.size))
    over_rows(sch, i_outer, lane_rows)


def _transpose_values(sch: Schedule) -> None:
    """A copy of V with a dim's tokens beside each other."""
    copy = sch.cache_read(sch.get_sblock("accumulate"), 1, "global")
    sch.transform_layout(copy, ("write", 0), swap)
    j, d = sch.get_loops(copy)[-2:]
    j_outer, j_tile = sch.split(j, [None, DEPTH])
    d_outer, d_tile = sch.split(d, [None, EDGE])
    sch.reorder(j_outer, d_outer, j_tile, d_tile)
    sch.tensorize(j_tile, transpose_tokens())

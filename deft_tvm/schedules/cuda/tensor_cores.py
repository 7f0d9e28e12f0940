"""Partial kernels on tensor cores: 16 rows a warp, all else in registers.

Both products run in 16 × 16 × 16 steps of ``mma``. Scores, probabilities and output accumulators
stay in fragments from one stage to the next; K, V and Q come out of shared memory by ``ldmatrix``.
Only the statistics of the rows, one float each, go through shared memory.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from deft_tvm.schedules.cuda.intrinsics import (
    SIDE,
    fill_zero,
    fragments_of,
    load_left,
    multiply,
    reduce_rows,
)
from deft_tvm.schedules.cuda.loading import load_tiles, locate_tokens
from deft_tvm.schedules.cuda.shares import FRAGMENT
from deft_tvm.schedules.cuda.threads import TILE_SCOPE, bind_threads, deal_threads, keep
from deft_tvm.schedules.rule import KernelTask, Knobs

MAX_ROWS = 128
MAX_WIDTH = 192
"""With wider output a thread's accumulators do not fit its 255 registers."""

ROW_BLOCKS = (
    "init_max",
    "init_sum",
    "new_max",
    "rescale",
    "new_sum",
    "keep_max",
    "keep_sum",
    "normalise",
    "write_lse",
)
ROW_REDUCTIONS = {"row_max": "max", "row_sum": "sum"}
PASSES = (
    "init_out",
    "logits",
    "masked_logits",
    "exponentials",
    "probabilities",
    "keep_out",
    "write_out",
)


def tensor_cores(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: tiles of 16-bit operands whose sides are multiples of 16."""
    tile = task.tile
    if tile is None or not _fits(task):
        return False
    operand, warps = tile.operand, tile.lane_rows // SIDE
    products = ("scores", "scores_rope") if task.spec.rope is not None else ("scores",)

    locate_tokens(sch, warps)
    load_tiles(task, sch, knobs, warps)

    fragments = (*products, "init_out", "logits", "exponentials", "probabilities")
    for block in (*fragments, "accumulate", "fold"):
        sch.set_scope(sch.get_sblock(block), 0, FRAGMENT)
        sch.transform_layout(sch.get_sblock(block), ("write", 0), fragments_of)
    for block in products:
        _product(sch, block, operand, transposed=True)
    columns = _product(sch, "accumulate", operand, transposed=False)
    _fold_at(sch, columns)
    for block in PASSES:
        _on_fragments(sch, block)

    keep(sch, (*ROW_BLOCKS[:5], *ROW_REDUCTIONS, "normalise"), TILE_SCOPE)
    for block, name in ROW_REDUCTIONS.items():
        _reduce(sch, block, reduce_rows(name, tile.kv_tile), warps)
    for block in ROW_BLOCKS:
        deal_threads(sch, block, warps)
    return True


def _fits(task: KernelTask) -> bool:
    tile, spec = task.tile, task.spec
    assert tile is not None
    sides = (tile.lane_rows, tile.kv_tile, spec.k_width, spec.v_width, spec.rope_width)
    if spec.tied:
        sides = (*sides, spec.k.begin - spec.v.begin)
    return (
        tile.operand != "float32"
        and tile.lane_rows <= MAX_ROWS
        and spec.v_width <= MAX_WIDTH
        and all(side % SIDE == 0 for side in sides)
    )


def _product(sch: Schedule, name: str, operand: str, transposed: bool) -> LoopRV:
    """One product in steps of 16; returns the loop over tile columns."""
    block = sch.get_sblock(name)
    row, column, inner = sch.get_loops(block)[-3:]
    rows, row = sch.split(row, [None, SIDE])
    columns, column = sch.split(column, [None, SIDE])
    steps, inner = sch.split(inner, [None, SIDE])
    if transposed:
        # The left factor is loaded once for all columns.
        sch.reorder(rows, steps, columns, row, column, inner)
    else:
        # Few accumulators live at a time: each is folded into the output as it is done.
        sch.reorder(rows, columns, steps, row, column, inner)
    sch.bind(rows, "threadIdx.y")
    tile = sch.blockize(row)
    if transposed:
        left = sch.cache_read(tile, 0, FRAGMENT)
        sch.compute_at(left, steps)
        sch.transform_layout(left, ("write", 0), fragments_of)
        i, j = sch.get_loops(left)[-2:]
        outer_i, i = sch.split(i, [None, SIDE])
        outer_j, j = sch.split(j, [None, SIDE])
        sch.reorder(outer_i, outer_j, i, j)
        sch.tensorize(sch.blockize(i), load_left(operand))
    first = sch.decompose_reduction(tile, steps)
    sch.tensorize(sch.get_loops(sch.get_child_blocks(first)[0])[-2], fill_zero())
    sch.tensorize(tile, multiply(operand, transposed))
    return columns


def _fold_at(sch: Schedule, columns: LoopRV) -> None:
    """Fold each 16 columns of the second product into the output as soon as they are done."""
    fold = sch.get_sblock("fold")
    sch.transform_block_layout(fold, fragments_of)
    sch.reverse_compute_at(fold, columns)
    lane, registers = sch.get_loops(fold)[-2:]
    sch.bind(lane, "threadIdx.x")
    sch.unroll(registers)


def _on_fragments(sch: Schedule, name: str) -> None:
    """A pass over a matrix, each lane over what it holds."""
    block = sch.get_sblock(name)
    sch.transform_block_layout(block, fragments_of)
    warp, tiles, lane, registers = sch.get_loops(block)[-4:]
    bind_threads(sch, warp, lane)
    sch.unroll(tiles)
    sch.unroll(registers)


def _reduce(sch: Schedule, name: str, intrinsic: str, warps: int) -> None:
    block = sch.get_sblock(name)
    row, _ = sch.get_loops(block)[-2:]
    warp, row = sch.split(row, [None, SIDE])
    sch.bind(warp, "threadIdx.y")
    first = sch.decompose_reduction(block, row)
    lane = sch.get_loops(first)[-1]
    sch.bind(sch.split(lane, [1, 32])[1], "threadIdx.x")
    sch.tensorize(row, intrinsic)

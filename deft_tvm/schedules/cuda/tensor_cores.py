"""Partial kernels on tensor cores: 16 rows a warp, all else in registers.

Both products run in 16 × 16 × 16 steps of ``mma``. Scores, probabilities and output accumulators
stay in fragments from one stage to the next; K, V and Q come out of shared memory by ``ldmatrix``.
Only the statistics of the rows, one float each, go through shared memory.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from deft_tvm.schedules.blocks import matrices_of_softmax, score_products
from deft_tvm.schedules.cuda.blocks import (
    MATRIX_PASSES,
    ROW_KEEPS,
    ROW_REDUCTIONS,
    ROW_STATES,
)
from deft_tvm.schedules.cuda.intrinsics import (
    SIDE,
    fill_zero,
    fragments_of,
    load_left,
    multiply,
)
from deft_tvm.schedules.cuda.loading import load_tiles, locate_tokens
from deft_tvm.schedules.cuda.row_reduction import reduce_rows
from deft_tvm.schedules.cuda.shares import FRAGMENT
from deft_tvm.schedules.cuda.threads import LANES, TILE_SCOPE, bind_threads, deal_threads, keep
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import unroll_all

MAX_ROWS = 128
MAX_WIDTH = 192
"""With wider output a thread's accumulators do not fit its 255 registers."""


def tensor_cores(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: tiles of 16-bit operands whose sides are multiples of 16."""
    tile = task.tile
    if tile is None or not _fits(task):
        return False
    operand, warps = tile.operand, tile.lane_rows // SIDE
    products, made = score_products(task.spec), matrices_of_softmax(task.spec)

    locate_tokens(task, sch, warps)
    load_tiles(task, sch, knobs, warps)

    matrices = ("init_out", *products, "logits", *made, "probabilities")
    for block in (*matrices, "accumulate", "fold"):
        keep(sch, (block,), FRAGMENT)
        sch.transform_layout(sch.get_sblock(block), ("write", 0), fragments_of)
    for block in products:
        _product(sch, block, operand, transposed=True)
    _fold_at(sch, _product(sch, "accumulate", operand, transposed=False))
    for block in (*MATRIX_PASSES, *made):
        _on_fragments(sch, block)

    keep(sch, (*ROW_STATES, *ROW_REDUCTIONS), TILE_SCOPE)
    for block, name in ROW_REDUCTIONS.items():
        _reduce(sch, block, reduce_rows(name, tile.kv_tile))
    for block in (*ROW_STATES, *ROW_KEEPS, "write_lse"):
        deal_threads(sch, block, warps)
    return True


def _fits(task: KernelTask) -> bool:
    tile, spec = task.tile, task.spec
    assert tile is not None
    sides = [tile.lane_rows, tile.kv_tile, spec.k_width, spec.v_width, spec.rope_width]
    if spec.tied:
        sides.append(spec.k.begin - spec.v.begin)
    return (
        tile.operand != "float32"
        and tile.lane_rows <= MAX_ROWS
        and spec.v_width <= MAX_WIDTH
        and all(side % SIDE == 0 for side in sides)
    )


def _product(sch: Schedule, name: str, operand: str, transposed: bool) -> LoopRV:
    """One product in steps of 16; returns the loop over tile columns.

    If `transposed`, the right factor is [n, k], and the left one comes out of shared memory, once
    for all columns. Otherwise the left one is in fragments, and columns are finished one tile
    after the other, so that few accumulators live at a time.
    """
    block = sch.get_sblock(name)
    (rows, row), (columns, column), (steps, inner) = (
        sch.split(loop, [None, SIDE]) for loop in sch.get_loops(block)[-3:]
    )
    outer = (rows, steps, columns) if transposed else (rows, columns, steps)
    sch.reorder(*outer, row, column, inner)
    sch.bind(rows, "threadIdx.y")
    tile = sch.blockize(row)
    if transposed:
        _load_left(sch, tile, steps, operand)
    first = sch.decompose_reduction(tile, steps)
    sch.tensorize(sch.get_loops(sch.get_child_blocks(first)[0])[-2], fill_zero())
    sch.tensorize(tile, multiply(operand, transposed))
    return columns


def _load_left(sch: Schedule, product: SBlockRV, steps: LoopRV, operand: str) -> None:
    """Bring the left factor of `product` into fragments, 16 columns a step."""
    left = sch.cache_read(product, 0, FRAGMENT)
    sch.compute_at(left, steps)
    sch.transform_layout(left, ("write", 0), fragments_of)
    (rows, row), (columns, column) = (
        sch.split(loop, [None, SIDE]) for loop in sch.get_loops(left)[-2:]
    )
    sch.reorder(rows, columns, row, column)
    sch.tensorize(sch.blockize(row), load_left(operand))


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
    unroll_all(sch, (tiles, registers))


def _reduce(sch: Schedule, name: str, intrinsic: str) -> None:
    """Each warp reduces its 16 rows."""
    block = sch.get_sblock(name)
    warp, row = sch.split(sch.get_loops(block)[-2], [None, SIDE])
    sch.bind(warp, "threadIdx.y")
    first = sch.decompose_reduction(block, row)
    _, lane = sch.split(sch.get_loops(first)[-1], [1, LANES])
    sch.bind(lane, "threadIdx.x")
    sch.tensorize(row, intrinsic)

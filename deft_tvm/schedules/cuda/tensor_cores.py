"""Partial kernels on tensor cores: 16 rows a warp or several, all else in registers.

Both products run in 16 × 16 × 16 steps of ``mma``. Scores and output accumulators stay in fragments
from one stage to the next; K, V and Q come out of shared memory by ``ldmatrix``. On Hopper four
warps multiply their 64 rows together (`warpgroups`), and shared memory is read for them.

Warps share a row's tokens in the first product and its output columns in the second. With few rows
that gives a block more warps, and with a wide V each of them fewer accumulators than a thread has
registers. What warps tell each other goes through shared memory: the statistics of the rows, one
float each, and where several have a row, its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from deft_tvm.dtypes import Dtype
from deft_tvm.plan.residency import GROUP_ROWS, PANEL, can_group
from deft_tvm.schedules.blocks import matrices_of_softmax, score_products
from deft_tvm.schedules.cuda.blocks import (
    OUTPUT_PASSES,
    ROW_KEEPS,
    ROW_REDUCTIONS,
    ROW_STATES,
    SCORE_PASSES,
)
from deft_tvm.schedules.cuda.intrinsics import (
    SIDE,
    fill_zero,
    fragment_of,
    fragments_of,
    load_left,
    multiply_on,
    multiply_transposed,
    rows_first,
)
from deft_tvm.schedules.cuda.limits import fits_staged
from deft_tvm.schedules.cuda.loading import load_tiles, locate_tokens, pad_rows
from deft_tvm.schedules.cuda.repeats import repeat
from deft_tvm.schedules.cuda.rounding import round_fragment, round_to_tile
from deft_tvm.schedules.cuda.row_reduction import reduce_rows
from deft_tvm.schedules.cuda.rows import ROWS
from deft_tvm.schedules.cuda.shares import FRAGMENT, QUAD_ROWS
from deft_tvm.schedules.cuda.threads import (
    LANES,
    TABLE_SCOPE,
    TILE_SCOPE,
    bind_warps,
    deal_quads,
    keep,
)
from deft_tvm.schedules.cuda.warpgroups import MOST_COLUMNS, group_scores, group_sums
from deft_tvm.schedules.rule import Knobs, PartialTask
from deft_tvm.schedules.verbs import unroll_all

Place = Callable[[Any, Any], tuple[Any, ...]]
"""Where an element of a matrix is, or in which iteration it is done."""

MAX_ROWS = 128
MAX_WARPS = 16
MAX_WIDTH = 256
"""Output columns of a warp beyond which a thread's accumulators do not fit its registers."""
GOOD_WIDTH = 128
"""Up to which they leave room for a second block on a multiprocessor."""
SHARES = (1, 2, 4, 8)
REGISTERS = 65536
"""Of a multiprocessor."""
OTHER_REGISTERS = 80
"""That a thread takes beside a tile's scores and its output (a guess)."""


def tensor_cores(task: PartialTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: tiles of 16-bit operands whose sides are multiples of 16."""
    tile, spec = task.tile, task.spec
    if not _fits(task):
        return False
    possible = _possible_shares(task)
    if not possible:
        return False
    grouped = _can_group(task) and bool(knobs.pick_number("groups", (0, 1), 1))
    shares = knobs.pick_number("shares", possible, _default_shares(task, possible, grouped))
    grouped &= _fits_groups(task, shares)
    # Warps that multiply together need all of a row's tokens, so that those with other columns
    # have the same tokens again.
    parts, copies = (1, shares) if grouped else (shares, 1)
    warps = tile.lane_rows // SIDE * shares
    products, made = score_products(spec), matrices_of_softmax(spec)

    locate_tokens(task, sch, warps)
    load_tiles(task, sch, knobs, warps, PANEL if grouped else None)

    of_tokens = fragments_of(tile.kv_tile, parts)
    of_columns = fragments_of(spec.v_width, shares)
    _hold(sch, (*products, "logits", *made), of_tokens)
    _hold(sch, ("init_out", "accumulate"), of_columns)
    if parts == 1:
        _hold(sch, ("probabilities",), of_tokens)
    else:
        keep(sch, ("probabilities",), TILE_SCOPE)
    keep(sch, (*ROW_STATES, *ROW_REDUCTIONS), QUAD_ROWS)

    for block, width in products.items():
        if grouped:
            scores = group_scores(tile.operand, width, tile.kv_tile)
            _multiply_in_groups(sch, block, of_tokens, 1, copies, scores)
        else:
            _product(sch, block, tile.operand, shares, True, width)
    for block in (*SCORE_PASSES, *made):
        _on_fragments(sch, block, of_tokens, copies)
    for block, name in ROW_REDUCTIONS.items():
        _reduce(sch, block, name, tile.kv_tile // parts, parts, copies)
    _round(sch, tile.operand, parts, copies)
    if grouped:
        sums = group_sums(tile.operand, spec.v_width // shares, tile.kv_tile)
        _multiply_in_groups(sch, "accumulate", of_columns, shares, 1, sums)
    else:
        depth = None if shares == 1 else tile.kv_tile
        _product(sch, "accumulate", tile.operand, shares, False, depth)
    for block in OUTPUT_PASSES:
        _on_fragments(sch, block, of_columns)
    _write(sch, rows_first(spec.v_width, shares))

    for block in (*ROW_STATES, *ROW_KEEPS):
        deal_quads(sch, block, shares)
    deal_quads(sch, "write_lse", shares, once=True)
    return True


def _hold(sch: Schedule, blocks: Iterable[str], place: Place) -> None:
    """Keep the matrix that each block writes in fragments."""
    keep(sch, blocks, FRAGMENT)
    for block in blocks:
        sch.transform_layout(sch.get_sblock(block), ("write", 0), place)


def _fits(task: PartialTask) -> bool:
    tile, spec = task.tile, task.spec
    sides = [tile.lane_rows, tile.kv_tile, spec.k_width, spec.v_width, spec.rope_width]
    if spec.tied:
        sides.append(spec.k.begin - spec.v.begin)
    return (
        tile.operand != "float32"
        and tile.lane_rows <= MAX_ROWS
        and all(side % SIDE == 0 for side in sides)
    )


def _possible_shares(task: PartialTask) -> list[int]:
    """Into how many equal parts the warps of a row can divide its tokens and its columns."""
    tile, width = task.tile, task.spec.v_width
    return [
        shares
        for shares in SHARES
        if tile.kv_tile % (SIDE * shares) == 0
        and width % (SIDE * shares) == 0
        and width // shares <= MAX_WIDTH
        and tile.lane_rows // SIDE * shares <= MAX_WARPS
    ]


def _default_shares(task: PartialTask, possible: list[int], grouped: bool) -> int:
    """The fewest that give each scheduler of a multiprocessor a warp, beside another block."""
    if grouped:
        return next(n for n in possible if _fits_groups(task, n))
    rows = task.tile.lane_rows // SIDE
    wanted = 4 if rows == 1 else 8
    good = (n for n in possible if rows * n >= wanted and task.spec.v_width // n <= GOOD_WIDTH)
    return next(good, possible[-1])


def _can_group(task: PartialTask) -> bool:
    """Whether warps can multiply in groups of four."""
    tile, spec = task.tile, task.spec
    return (
        can_group(spec, tile.operand, {str(task.target["arch"])})
        and tile.lane_rows % GROUP_ROWS == 0
        and fits_staged(task, 2, 0)
        and any(_fits_groups(task, shares) for shares in _possible_shares(task))
    )


def _fits_groups(task: PartialTask, shares: int) -> bool:
    """Whether each warp has whole panels of output, and registers for them."""
    tile, width = task.tile, task.spec.v_width // shares
    threads = tile.lane_rows // SIDE * shares * LANES
    held = SIDE * (width + tile.kv_tile) // LANES + OTHER_REGISTERS
    return width % PANEL == 0 and width <= MOST_COLUMNS and threads * held <= REGISTERS


def _multiply_in_groups(
    sch: Schedule, name: str, place: Place, shares: int, copies: int, intrinsic: str
) -> None:
    """One product by groups of four warps, each warp's 16 rows in one go."""
    rows, columns, steps = sch.get_loops(sch.get_sblock(name))[-3:]
    rows, row = sch.split(rows, [None, SIDE])
    share, columns = sch.split(columns, [shares, None])
    all_steps, _ = sch.split(steps, [1, None])
    sch.reorder(share, rows, all_steps, row, columns)
    bind_warps(sch, share, rows, copies)
    tile = sch.blockize(row)
    (first,) = sch.get_child_blocks(sch.decompose_reduction(tile, all_steps))
    _begin(sch, first, lambda i, j: place(i, j)[-3:], axes=3)
    sch.tensorize(tile, intrinsic)


def _product(
    sch: Schedule, name: str, operand: str, shares: int, transposed: bool, depth: int | None
) -> None:
    """One product in steps of 16.

    If `transposed`, the right factor is [n, k], the left one comes out of shared memory, once for
    all columns, and sums begin with zero. Otherwise they begin with the output so far, rescaled.

    Args:
        depth: of the left factor, which lies in shared memory; None if it is in fragments.
    """
    block = sch.get_sblock(name)
    rows, columns, steps = sch.get_loops(block)[-3:]
    rows, row = sch.split(rows, [None, SIDE])
    share, columns, column = sch.split(columns, [shares, None, SIDE])
    steps, inner = sch.split(steps, [None, SIDE])
    order = (steps, columns) if transposed else (columns, steps)
    sch.reorder(share, rows, *order, row, column, inner)
    warp = bind_warps(sch, share, rows)
    tile = sch.blockize(row)
    if depth is not None:
        _load_left(sch, tile, steps if transposed else warp, operand, depth)
    (first,) = sch.get_child_blocks(sch.decompose_reduction(tile, steps))
    if transposed:
        sch.tensorize(sch.get_loops(first)[-2], fill_zero())
    else:
        _begin(sch, first, fragment_of, axes=2)
    sch.tensorize(tile, multiply_transposed(operand) if transposed else multiply_on(operand))
    # An index that is no constant would send accumulators to local memory.
    unroll_all(sch, (columns,) if transposed else (columns, steps))


def _begin(sch: Schedule, block: SBlockRV, place: Place, axes: int) -> None:
    """What sums begin with, each lane its own: `place` has so many axes, a lane and its registers
    the last two."""
    sch.transform_block_layout(block, place)
    *tiles, lane, registers = sch.get_loops(block)[-axes:]
    sch.bind(lane, "threadIdx.x")
    unroll_all(sch, (*tiles, registers))


def _load_left(sch: Schedule, product: SBlockRV, at: LoopRV, operand: str, depth: int) -> None:
    """Bring the left factor of `product` into fragments, as much as is read within a loop."""
    in_tiles = (
        index
        for index, region in enumerate(sch.get(product).reads)
        if region.source.scope() == TILE_SCOPE
    )
    left = sch.cache_read(product, next(in_tiles), FRAGMENT)
    sch.compute_at(left, at)
    sch.transform_layout(left, ("write", 0), fragments_of(depth))
    (rows, row), (columns, column) = (
        sch.split(loop, [None, SIDE]) for loop in sch.get_loops(left)[-2:]
    )
    sch.reorder(rows, columns, row, column)
    sch.tensorize(sch.blockize(row), load_left(operand))


def _round(sch: Schedule, operand: Dtype, shares: int, copies: int) -> None:
    """Round the weights of V to where the second product takes them from."""
    rows, columns = sch.get_loops(sch.get_sblock("probabilities"))[-2:]
    rows, row = sch.split(rows, [None, SIDE])
    share, columns, column = sch.split(columns, [shares, None, SIDE])
    sch.reorder(share, rows, columns, row, column)
    bind_warps(sch, share, rows, copies)
    sch.unroll(columns)
    if shares == 1:
        sch.tensorize(row, round_fragment(operand))
        return
    tile = sch.blockize(row)
    # Of the block that stays: an intrinsic's own has no annotations.
    pad_rows(sch, [tile], operand)
    sch.tensorize(tile, round_to_tile(operand))


def _on_fragments(sch: Schedule, name: str, place: Place, copies: int = 1) -> None:
    """A pass over a matrix, each lane over what it holds."""
    block = sch.get_sblock(name)
    sch.transform_block_layout(block, place)
    rows, share, tiles, lane, registers = sch.get_loops(block)[-5:]
    sch.reorder(share, rows)
    bind_warps(sch, share, rows, copies)
    sch.bind(lane, "threadIdx.x")
    unroll_all(sch, (tiles, registers))


def _write(sch: Schedule, place: Place) -> None:
    """Write the output row by row."""
    block = sch.get_sblock("write_out")
    sch.transform_block_layout(block, place)
    rows, share, lane, row, *columns = sch.get_loops(block)[-7:]
    sch.reorder(share, rows)
    bind_warps(sch, share, rows)
    sch.bind(lane, "threadIdx.x")
    sch.annotate(row, ROWS, 1)
    unroll_all(sch, (row, *columns[:-1]))
    sch.vectorize(columns[-1])


def _reduce(
    sch: Schedule, name: str, operation: str, columns: int, shares: int, copies: int
) -> None:
    """Each warp reduces its tokens of 16 rows; then each reduces over all warps that have them."""
    of_warp = sch.get_sblock(name)
    rows, tokens = sch.get_loops(of_warp)[-2:]
    share, tokens = sch.split(tokens, [shares, None])
    if shares > 1:
        of_warp = sch.rfactor(share, 0)
        sch.set_scope(of_warp, 0, QUAD_ROWS)
        _tell(sch, sch.cache_read(sch.get_sblock(name), 0, TABLE_SCOPE))
        deal_quads(sch, name, shares)
        rows, share, tokens = sch.get_loops(of_warp)[-3:]
    rows, row = sch.split(rows, [None, SIDE])
    sch.reorder(share, rows, row, tokens)
    bind_warps(sch, share, rows, copies)
    first = sch.decompose_reduction(of_warp, row)
    upper, quad = sch.split(sch.get_loops(first)[-1], [2, 8])
    sch.reorder(quad, upper)
    repeat(sch, quad, "threadIdx.x", LANES // 8)
    sch.unroll(upper)
    sch.tensorize(row, reduce_rows(operation, columns))


def _tell(sch: Schedule, block: SBlockRV) -> None:
    """Each warp writes what it found of its rows, ``[share, row]``, for the others."""
    share, row = sch.get_loops(block)[-2:]
    rows, upper, quad = sch.split(row, [None, 2, 8])
    sch.reorder(share, rows, quad, upper)
    bind_warps(sch, share, rows)
    repeat(sch, quad, "threadIdx.x", LANES // 8, once=True)
    sch.unroll(upper)

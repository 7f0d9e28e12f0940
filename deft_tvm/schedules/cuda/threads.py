"""Verbs of every CUDA schedule: which thread does what.

A block is ``threadIdx.y`` warps of 32 lanes, the same in every loop nest of a kernel. A nest that
has fewer elements than threads is guarded by the predicate that ``split`` adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from deft_tvm.schedules.cuda.repeats import repeat
from deft_tvm.schedules.verbs import unroll_all

LANES = 32
TILE_SCOPE = "shared.dyn"

TABLE_SCOPE = "shared"
"""For what is read while a tile is loaded: TVM takes all of ``shared.dyn`` for one buffer, and puts
a barrier between a read of one table and a write to another tile."""


def keep(sch: Schedule, blocks: Iterable[str], scope: str) -> None:
    """Keep what each block writes in `scope`."""
    for block in blocks:
        sch.set_scope(sch.get_sblock(block), 0, scope)


def bind_threads(sch: Schedule, warp: LoopRV, lane: LoopRV) -> None:
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


def bind_warps(sch: Schedule, share: LoopRV, rows: LoopRV, copies: int = 1) -> LoopRV:
    """Shares and tiles of rows to warps: neighbours have the same share of neighbouring tiles, as
    those must that multiply together. `copies` of each do the same."""
    warp = sch.fuse(share, rows)
    if copies == 1:
        sch.bind(warp, "threadIdx.y")
    else:
        repeat(sch, warp, "threadIdx.y", copies)
    return warp


def deal(sch: Schedule, block: str, warps: Any) -> None:
    """Rows to warps and columns to lanes; each thread's own elements are unrolled.

        for i, c, *rest   →   warp, lane, *rest, i / warps, c / 32

    `rest` are the loops of a reduction, if there is one.
    """
    sblock = sch.get_sblock(block)
    row, column, *rest = _own_loops(sch, block)
    rows, warp = sch.split(row, [None, warps])
    columns, lane = sch.split(column, [None, LANES])
    sch.reorder(warp, lane, *rest, rows, columns)
    bind_threads(sch, warp, lane)
    unroll_all(sch, (rows, columns))
    if rest:
        sch.decompose_reduction(sblock, rest[0])


def deal_rows(sch: Schedule, block: str, warps: Any) -> None:
    """Rows to warps; all lanes of a warp do the same."""
    rows, warp = sch.split(_own_loops(sch, block)[0], [None, warps])
    sch.bind(warp, "threadIdx.y")
    sch.unroll(rows)


def deal_threads(sch: Schedule, block: str, warps: Any) -> None:
    """Elements of the first loop to all threads; the loops of a reduction stay inside."""
    sblock = sch.get_sblock(block)
    loop, *rest = _own_loops(sch, block)
    own, warp, lane = sch.split(loop, [None, warps, LANES])
    sch.reorder(warp, lane, *rest, own)
    bind_threads(sch, warp, lane)
    if rest:
        sch.decompose_reduction(sblock, rest[0])


def deal_quads(sch: Schedule, block: str, shares: int, *, once: bool = False) -> None:
    """Rows to the lanes that hold their elements in fragments: two to each, the same two to four.

    Args:
        shares: warps that have the same rows, and all do the same.
        once: only the first lane of four does it, of the first of these warps.
    """
    sblock = sch.get_sblock(block)
    loop, *rest = _own_loops(sch, block)
    warp, upper, quad = sch.split(loop, [None, 2, 8])
    sch.reorder(warp, quad, *rest, upper)
    repeat(sch, warp, "threadIdx.y", shares, once=once)
    repeat(sch, quad, "threadIdx.x", LANES // 8, once=once)
    sch.unroll(upper)
    if rest:
        sch.decompose_reduction(sblock, rest[0])


def reduce_in_warps(sch: Schedule, block: str, warps: Any) -> None:
    """Rows to warps, whose lanes reduce over the columns together."""
    row, column = _own_loops(sch, block)
    rows, warp = sch.split(row, [None, warps])
    columns, lane = sch.split(column, [None, LANES])
    sch.reorder(warp, rows, lane, columns)
    bind_threads(sch, warp, lane)
    unroll_all(sch, (rows, columns))


def by_first_lane(sch: Schedule, block: str) -> None:
    """Let one lane of each warp do what all would do alike."""
    _, lane = sch.split(sch.add_unit_loop(sch.get_sblock(block)), [1, LANES])
    sch.bind(lane, "threadIdx.x")


def by_first_thread(sch: Schedule, block: str, warps: Any) -> None:
    """Let one thread do what all would do alike."""
    _, warp, lane = sch.split(sch.add_unit_loop(sch.get_sblock(block)), [1, warps, LANES])
    bind_threads(sch, warp, lane)


def _own_loops(sch: Schedule, block: str) -> list[LoopRV]:
    """The loops that bind the block's own axes, without those around its stage."""
    sblock = sch.get_sblock(block)
    return sch.get_loops(sblock)[-len(sch.get(sblock).iter_vars) :]

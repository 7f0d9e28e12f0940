"""Loops over a tile's lane rows that end where an item's rows do.

A tile class has room for so many lane rows, and an item fills some of it. What takes rows a block
at a time, a register tile, ends with the block that has the item's last row; of that block it takes
half, where the rows lie in its first half: 33 rows cost 40, in blocks of 16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import IRModule, s_tir, tirx, transform
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.tirx import Var
from tvm.tirx.buffer import is_buffer_var

from deft_tvm.schedules.cpu.vector import REGISTERS

LANE_ROWS = "deft_tvm.lane_rows"
BLOCK = "deft_tvm.block"
"""Says of a loop what it goes over, inside one over blocks:"""
PARTS, DEPTH, VECTORS, ELEMENTS = "parts", "depth", "vectors", "elements"
HALF_OF_A_VECTOR = {ELEMENTS: 0.5}
HALF_OF_THE_VECTORS = {VECTORS: 0.5, DEPTH: 2, PARTS: 0.5}
"""How often, for half a block, such loops go round."""
LANES = "lanes"
"""What the computation calls the number of lane rows that an item has."""
FEWEST = 8
"""Elements of a vector that are left undivided: half of AVX-512's are AVX2's."""


def over_rows(sch: Schedule, loop: LoopRV, lane_rows: int) -> None:
    """Say that a loop goes over the `lane_rows` of a tile, in equal parts and in their order."""
    sch.annotate(loop, LANE_ROWS, lane_rows)


def within_block(sch: Schedule, what: str, loops: Sequence[LoopRV]) -> None:
    """Say what loops of a body that takes one block go over.

    Half a block has half of its vectors, or half of the elements of its only one. With half of the
    vectors it is twice as deep: the accumulators are as many, and so are the products under way.

    Args:
        sch: the schedule.
        what: `VECTORS` of rows, their `ELEMENTS`, `PARTS` of the other dimension, their `DEPTH`.
        loops: all that do so, of every stage of the body.
    """
    for loop in loops:
        sch.annotate(loop, BLOCK, what)


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.TrimRows")
def trim_rows(
    func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
) -> tirx.PrimFunc:
    """End every loop over a tile's lane rows with the item's last.

    A block is what the loop in the largest steps takes at a time, and all loops end with the same
    half or whole one. Lanes without a row cost nothing, but for those beside the last rows. A pass
    of whole vectors may go over lanes beside half a block that no product has written, which hold
    anything: no lane reads another's, and nothing is stored of one without a row.
    """
    loops: list[tirx.For] = []
    lanes: list[Any] = []

    def look(loop: tirx.For) -> None:
        if LANE_ROWS in loop.annotations:
            loops.append(loop)

    def bound(bind: tirx.Bind) -> None:
        if bind.var.name == LANES:
            lanes.append(bind.var)

    tvm_ffi.structural_walk(func.body, [(tirx.For, look), (tirx.Bind, bound)])
    if not loops:
        return func
    block, (last,) = max(map(_step, loops)), lanes
    halved = any(_step(loop) == block and _halving(loop) for loop in loops)
    granule = block // 2 if halved else block
    granules = tirx.floordiv(last + (granule - 1), granule)

    def trim(loop: tirx.For) -> tirx.Stmt:
        if LANE_ROWS not in loop.annotations:
            return _plain(loop, loop.min, loop.extent)
        step = _step(loop)
        if step <= granule:
            return _plain(loop, loop.min, granules * (granule // step))
        factors = _halving(loop)
        if not factors:
            return _plain(loop, loop.min, tirx.floordiv(granules + 1, 2))
        blocks = tirx.floordiv(granules, 2)
        half = _plain(_scaled(loop, factors), blocks, tirx.floormod(granules, 2))
        return tirx.SeqStmt([_plain(loop, loop.min, blocks), _renewed(half)])

    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, trim)], order="pre"))


def _halving(loop: tirx.For) -> Mapping[str, float]:
    """How often loops inside one over blocks go round for half a block, if blocks have halves.

    A single block has none: items of so few rows are of a smaller class.
    """
    extents = defaultdict[str, set[int]](set)

    def look(inner: tirx.For) -> None:
        if BLOCK in inner.annotations:
            extents[inner.annotations[BLOCK]].add(int(inner.extent))

    tvm_ffi.structural_walk(loop.body, [(tirx.For, look)])
    if int(loop.extent) == 1 or not extents[VECTORS]:
        return {}
    if extents[VECTORS] == {1}:
        return HALF_OF_A_VECTOR if min(extents[ELEMENTS], default=0) > FEWEST else {}
    even = all(extent % 2 == 0 for extent in extents[VECTORS] | extents[PARTS])
    return HALF_OF_THE_VECTORS if even else {}


def _scaled(loop: tirx.For, factors: Mapping[str, float]) -> tirx.For:
    """Let loops inside another go round so many times as often.

    Half as many parts are twice as large, so that each begins where every other one did, and
    register tiles are twice as deep and half as wide.
    """
    turned: dict[Any, Any] = {}

    def scale(inner: tirx.For) -> tirx.For:
        what = inner.annotations.get(BLOCK)
        if what not in factors:
            return inner
        body = inner.body
        if what == PARTS:
            begin = {inner.loop_var: inner.loop_var * 2}
            body = tvm_ffi.structural_map(body, [(Var, lambda v: begin.get(v, v))], order="post")
        return _with(inner, int(int(inner.extent) * factors[what]), body)

    def turn(var: Any) -> Any:
        if not is_buffer_var(var) or var.scope() != REGISTERS:
            return var
        if var not in turned:
            deep, wide = map(int, var.ty.shape)
            shape = (2 * deep, wide // 2)
            turned[var] = tirx.decl_buffer(shape, var.ty.dtype, var.name, scope=REGISTERS)
        return turned[var]

    body = tvm_ffi.structural_map(loop.body, [(tirx.For, scale)], order="post")
    if PARTS in factors:
        body = tvm_ffi.structural_map(body, [(Var, turn)], order="post")
    return _with(loop, loop.extent, body)


def _plain(loop: tirx.For, begin: Any, extent: Any) -> tirx.For:
    """The loop over another range, without what this pass is told by."""
    told = (LANE_ROWS, BLOCK)
    kept = {key: value for key, value in loop.annotations.items() if key not in told}
    return tirx.For(loop.loop_var, begin, extent, loop.kind, loop.body, loop.thread_binding, kept)


def _with(loop: tirx.For, extent: Any, body: Any) -> tirx.For:
    return tirx.For(
        loop.loop_var, loop.min, extent, loop.kind, body, loop.thread_binding, loop.annotations
    )


def _renewed(loop: tirx.For) -> tirx.Stmt:
    """A second copy of the same loop, which defines variables of its own."""
    return s_tir.renew_defs(tirx.PrimFunc([], loop)).body


def _step(loop: tirx.For) -> int:
    """Lane rows that a turn of the loop takes."""
    return int(loop.annotations[LANE_ROWS]) // int(loop.extent)

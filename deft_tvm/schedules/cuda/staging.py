"""Loading one tile ahead: double buffers and asynchronous copies.

A schedule annotates the loop over tiles with `STAGES`, and with `AHEAD` those stages of its body
that only fetch. Where the value is 2, the pass here doubles what these write for the others, in
shared memory, and turns

    for step: fetch(step); use(step)

into

    fetch(0); for step: wait; if step + 1 is a tile: fetch(step + 1); use(step)

with ``cp.async`` for the copies, which run while the step before is worked on. Both halves of a
buffer are its first axis. TVM's own software pipeline is not used: with a number of tiles known
only at run time it puts the last step under a condition, where TVM can place no barrier.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import Call, TensorLoad, Var
from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.script import tirx as T
from tvm.tirx.buffer import is_buffer_var

from deft_tvm.schedules.cuda.allocations import lift, with_allocations
from deft_tvm.schedules.cuda.copies import asynchronous
from deft_tvm.schedules.cuda.statements import substitute

STAGES = "deft_tvm.stages"
AHEAD = "deft_tvm.ahead"
LOCATE, LOAD = 1, 2
"""Values of `AHEAD`. Locating may go on past the last tile, where it finds no tokens."""
LOCATED = "deft_tvm.located"
"""Annotation of the loop over tiles: how many are located at a time, which is under a condition."""

FENCED = "deft_tvm.fenced"
"""Annotation of the same loop: what was copied is read by hardware of its own, not by threads."""

WAIT = """
__device__ __forceinline__ void deft_wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
"""
WAIT_AND_FENCE = """
__device__ __forceinline__ void deft_wait_for_copies_and_fence() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
"""


def load_ahead(sch: Schedule, stages: Any, located: int, fenced: bool) -> None:
    """Annotate the tile loop of a partial kernel that locates `located` tiles at a time.

    Args:
        fenced: see `FENCED`.
    """
    loop = sch.get_loops(sch.get_sblock("tile"))[-1]
    sch.annotate(loop, STAGES, stages)
    sch.annotate(loop, LOCATED, located)
    sch.annotate(loop, FENCED, int(fenced))
    for block, value in (("locating", LOCATE), ("loading", LOAD)):
        sch.annotate(sch.get_loops(sch.get_sblock(block))[-1], AHEAD, value)


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.FetchOneTileAhead")
def fetch_one_tile_ahead(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Rewrite the loops annotated with two `STAGES`."""
    doubled: list[Any] = []

    def rewrite(loop: tirx.For) -> tirx.Stmt:
        if int(loop.annotations.get(STAGES, 1)) == 1:
            return loop
        staged = _Staged(loop)
        doubled.extend(staged.doubled)
        return staged.statement()

    body = tvm_ffi.structural_map(func.body, [(tirx.For, rewrite)], order="post")
    return func.with_body(_grown(body, doubled)) if doubled else func


class _Staged:
    """One loop over tiles, taken apart."""

    def __init__(self, loop: tirx.For) -> None:
        self.loop = loop
        self.block = loop.body.block
        self.bind, *stages = list(self.block.body.seq)
        self.ahead = [stage for stage in stages if _mark(stage)]
        self.rest = [stage for stage in stages if not _mark(stage)]
        self.located = int(loop.annotations[LOCATED])
        self.fenced = bool(loop.annotations[FENCED])
        self.tables = _buffers([s for s in self.ahead if _mark(s) == LOCATE], stores=True)
        self.written = _buffers(self.ahead, stores=True)
        used = _buffers(self.rest, stores=False)
        self.doubled = [buffer for buffer in self.written if _among(buffer, used)]

    def statement(self) -> tirx.Stmt:
        """The loop with all that comes before it, in a block that owns the doubled buffers."""
        loop, step = self.loop, self.loop.loop_var
        zero, one = (tirx.IntImm("int32", value) for value in (0, 1))
        name, text = "deft_wait_for_copies", WAIT
        if self.fenced:
            name, text = "deft_wait_for_copies_and_fence", WAIT_AND_FENCE
        wait = tirx.Evaluate(T.cuda.func_call(name, source_code=text))
        following = self._fetch(step + one, step + one < loop.extent)
        rest = [self._at(stage, step) for stage in self.rest]
        body = tirx.SeqStmt([wait, _barrier(), *following, self.bind, *rest])
        realize = SBlockRealize(
            loop.body.iter_values,
            loop.body.predicate,
            with_allocations(self.block, body, list(self.block.alloc_buffers)),
        )
        inner = tirx.For(step, loop.min, loop.extent, loop.kind, realize, loop.thread_binding, {})
        whole = SBlock(
            [], [], [], "staged", tirx.SeqStmt([*self._fetch(zero, None), inner]), None, [], [], {}
        )
        return SBlockRealize([], True, lift(whole, lambda b: _among(b, self.written)))

    def _fetch(self, tile: Any, condition: Any) -> list[tirx.Stmt]:
        """The stages that go ahead, for tile number `tile`."""
        begin = Var("t_ahead", "int32")
        value = substitute(self.bind.value, self.loop.loop_var, tile)
        fetched: list[tirx.Stmt] = [tirx.Bind(begin, value)]
        for stage in self.ahead:
            moved = substitute(stage, self.bind.var, begin)
            moved = self._at(substitute(moved, self.loop.loop_var, tile), tile)
            if isinstance(moved, tirx.IfThenElse):
                # What is located seldom is waited for as seldom.
                then = tirx.SeqStmt([moved.then_case, _barrier()])
                moved = tirx.IfThenElse(moved.condition, then, None)
            if _mark(stage) == LOAD:
                moved = asynchronous(moved)
                if condition is not None:
                    moved = tirx.IfThenElse(condition, moved, None)
            fetched.append(moved)
        return fetched

    def _half(self, buffer: Any, tile: Any) -> Any:
        """In which half of a doubled buffer tile number `tile` is."""
        if _among(buffer, self.tables):
            tile = tirx.floordiv(tile, tirx.IntImm("int32", self.located))
        return tirx.floormod(tile, tirx.IntImm("int32", 2))

    def _at(self, statement: tirx.Stmt, tile: Any) -> tirx.Stmt:
        """`statement` on the doubled buffers' halves for tile number `tile`."""

        def shifted(buffer: Any, indices: Any) -> list[Any]:
            return [indices[0] + self._half(buffer, tile) * buffer.ty.shape[0], *indices[1:]]

        def store(node: Any) -> Any:
            if not self._is_doubled(node.buffer):
                return node
            return tirx.BufferStore(node.buffer, node.value, shifted(node.buffer, node.indices))

        def load(node: Any) -> Any:
            if not self._is_doubled(node.source):
                return node
            return tirx.BufferLoad(node.source, shifted(node.source, node.indices))

        def pointer(call: Any) -> Any:
            buffer = _pointed(call)
            if buffer is None or not self._is_doubled(buffer):
                return call
            kind, data, offset, *others = call.args
            half = buffer.offset_of([buffer.ty.shape[0], *[0] * (len(buffer.ty.shape) - 1)])[0]
            arguments = (kind, data, offset + self._half(buffer, tile) * half, *others)
            return tirx.call_intrin("handle", "tirx.tvm_access_ptr", *arguments)

        uses = [(tirx.BufferStore, store), (TensorLoad, load), (Call, pointer)]
        return tvm_ffi.structural_map(statement, uses, order="post")

    def _is_doubled(self, buffer: Any) -> bool:
        return _among(buffer, self.doubled)


def _barrier() -> tirx.Stmt:
    """For all threads of a block."""
    return tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


def _among(buffer: Any, buffers: list[Any]) -> bool:
    return any(buffer.same_as(other) for other in buffers)


def _mark(stage: tirx.Stmt) -> int:
    if isinstance(stage, tirx.IfThenElse):
        return _mark(stage.then_case)
    return int(stage.annotations.get(AHEAD, 0)) if isinstance(stage, tirx.For) else 0


def _buffers(statements: list[tirx.Stmt], stores: bool) -> list[Any]:
    """The shared buffers that are stored to, or that are used in any way."""
    found: list[Any] = []

    def note(buffer: Any) -> None:
        if is_buffer_var(buffer) and buffer.scope().startswith("shared"):
            found.append(buffer)

    uses: list[Any] = [(tirx.BufferStore, lambda node: note(node.buffer))]
    if not stores:
        uses += [
            (TensorLoad, lambda node: note(node.source)),
            (Call, lambda call: note(_pointed(call))),
        ]
    for statement in statements:
        tvm_ffi.structural_walk(statement, uses)
    return list(dict.fromkeys(found))


def _pointed(call: Any) -> Any:
    """The buffer that an access pointer leads into; None for any other call."""
    if getattr(call.op, "name", "") != "tirx.tvm_access_ptr":
        return None
    data = call.args[1]
    return data.args[0] if isinstance(data, Call) else data


def _grown(body: tirx.Stmt, doubled: list[Any]) -> tirx.Stmt:
    """`body` with twice the room in each doubled buffer."""
    twice: dict[Any, Any] = {}
    for buffer in doubled:
        whole = buffer.ty
        rows, *columns = whole.shape
        twice[buffer] = tirx.decl_buffer(
            [rows * 2, *columns],
            whole.dtype,
            buffer.name,
            strides=list(whole.strides),
            scope=buffer.scope(),
        )
    return tvm_ffi.structural_map(body, [(Var, lambda var: twice.get(var, var))], order="post")

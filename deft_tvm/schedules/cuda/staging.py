"""Loading tiles ahead: buffers for several of them, and asynchronous copies.

A schedule annotates the loop over tiles with `STAGES`, of how many tiles there is room, and with
`AHEAD` those stages of its body that only fetch. From 2 on the pass here multiplies what these
write for the others, in shared memory, and turns

    for step: fetch(step); use(step)

into

    fetch(0); for step: wait; if step + 1 is a tile: fetch(step + 1); use(step)

or, with more than one tile under way (`n` is `STAGES` - 1),

    for step < n: fetch(step); for step: wait; if step + n is a tile: fetch(step + n); use(step)

with ``cp.async`` for the copies, which run while the steps before are worked on. Parts of a buffer
follow each other on its first axis. TVM's own software pipeline is not used: with a number of tiles
known only at run time it puts the last step under a condition, where TVM can place no barrier.
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
__device__ __forceinline__ void deft_wait_for_copies%(but)s() {
  asm volatile("cp.async.%(wait)s;" ::: "memory");
}
"""
WAIT_AND_FENCE = """
__device__ __forceinline__ void deft_wait_for_copies%(but)s_and_fence() {
  asm volatile("cp.async.%(wait)s;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
"""
COMMIT = """
__device__ __forceinline__ void deft_close_group_of_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
"""
TABLES = 2
"""Parts of what `LOCATE` writes: it is located for at least as many tiles as are fetched ahead."""


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


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.FetchTilesAhead")
def fetch_tiles_ahead(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Rewrite the loops annotated with two `STAGES` or more."""
    parts: dict[Any, int] = {}

    def rewrite(loop: tirx.For) -> tirx.Stmt:
        if int(loop.annotations.get(STAGES, 1)) == 1:
            return loop
        staged = _Staged(loop)
        parts.update(staged.parts)
        return staged.statement()

    body = tvm_ffi.structural_map(func.body, [(tirx.For, rewrite)], order="post")
    return func.with_body(_grown(body, parts)) if parts else func


class _Staged:
    """One loop over tiles, taken apart."""

    def __init__(self, loop: tirx.For) -> None:
        self.loop = loop
        self.block = loop.body.block
        self.bind, *stages = list(self.block.body.seq)
        self.ahead = [stage for stage in stages if _mark(stage)]
        self.rest = [stage for stage in stages if not _mark(stage)]
        self.stages = int(loop.annotations[STAGES])
        self.located = int(loop.annotations[LOCATED])
        self.fenced = bool(loop.annotations[FENCED])
        self.tables = _buffers([s for s in self.ahead if _mark(s) == LOCATE], stores=True)
        self.written = _buffers(self.ahead, stores=True)
        used = _buffers(self.rest, stores=False)
        self.parts = {
            buffer: TABLES if _among(buffer, self.tables) else self.stages
            for buffer in self.written
            if _among(buffer, used)
        }

    def statement(self) -> tirx.Stmt:
        """The loop with all that comes before it, in a block that owns the multiplied buffers."""
        loop, step = self.loop, self.loop.loop_var
        following = step + tirx.IntImm("int32", self.stages - 1)
        fetch = [*self._fetch(following, following < loop.extent), *self._close_group()]
        rest = [self._at(stage, step) for stage in self.rest]
        body = tirx.SeqStmt([self._wait(), _barrier(), *fetch, self.bind, *rest])
        realize = SBlockRealize(
            loop.body.iter_values,
            loop.body.predicate,
            with_allocations(self.block, body, list(self.block.alloc_buffers)),
        )
        inner = tirx.For(step, loop.min, loop.extent, loop.kind, realize, loop.thread_binding, {})
        first = tirx.SeqStmt([*self._first(), inner])
        whole = SBlock([], [], [], "staged", first, None, [], [], {})
        return SBlockRealize([], True, lift(whole, lambda b: _among(b, self.written)))

    def _first(self) -> list[tirx.Stmt]:
        """What is fetched before the loop. There is a first tile, but maybe no second one."""
        zero = tirx.IntImm("int32", 0)
        if self.stages == 2:
            return self._fetch(zero, None)
        tile = Var("first", "int32")
        fetch = [*self._fetch(tile, tile < self.loop.extent), *self._close_group()]
        return [tirx.For(tile, zero, self.stages - 1, tirx.ForKind.SERIAL, tirx.SeqStmt(fetch))]

    def _wait(self) -> tirx.Stmt:
        """Until the copies of this step's tile have landed: of one group, or of all."""
        later = self.stages - 2
        said = {"but": f"_but_{later}", "wait": f"wait_group {later}"}
        if later == 0:
            said = {"but": "", "wait": "wait_all"}
        name, text = f"deft_wait_for_copies{said['but']}", WAIT
        if self.fenced:
            name, text = f"{name}_and_fence", WAIT_AND_FENCE
        return tirx.Evaluate(T.cuda.func_call(name, source_code=text % said))

    def _close_group(self) -> list[tirx.Stmt]:
        """After a fetch, also where there was nothing to fetch, since groups are counted."""
        if self.stages == 2:
            return []
        call = T.cuda.func_call("deft_close_group_of_copies", source_code=COMMIT)
        return [tirx.Evaluate(call)]

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

    def _part(self, buffer: Any, tile: Any) -> Any:
        """In which part of a multiplied buffer tile number `tile` is."""
        if _among(buffer, self.tables):
            tile = tirx.floordiv(tile, tirx.IntImm("int32", self.located))
        return tirx.floormod(tile, tirx.IntImm("int32", self.parts[buffer]))

    def _at(self, statement: tirx.Stmt, tile: Any) -> tirx.Stmt:
        """`statement` on the multiplied buffers' parts for tile number `tile`."""

        def shifted(buffer: Any, indices: Any) -> list[Any]:
            return [indices[0] + self._part(buffer, tile) * buffer.ty.shape[0], *indices[1:]]

        def store(node: Any) -> Any:
            if node.buffer not in self.parts:
                return node
            return tirx.BufferStore(node.buffer, node.value, shifted(node.buffer, node.indices))

        def load(node: Any) -> Any:
            if node.source not in self.parts:
                return node
            return tirx.BufferLoad(node.source, shifted(node.source, node.indices))

        def pointer(call: Any) -> Any:
            buffer = _pointed(call)
            if buffer is None or buffer not in self.parts:
                return call
            kind, data, offset, *others = call.args
            part = buffer.offset_of([buffer.ty.shape[0], *[0] * (len(buffer.ty.shape) - 1)])[0]
            arguments = (kind, data, offset + self._part(buffer, tile) * part, *others)
            return tirx.call_intrin("handle", "tirx.tvm_access_ptr", *arguments)

        uses = [(tirx.BufferStore, store), (TensorLoad, load), (Call, pointer)]
        return tvm_ffi.structural_map(statement, uses, order="post")


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


def _grown(body: tirx.Stmt, parts: dict[Any, int]) -> tirx.Stmt:
    """`body` with room for so many parts in each buffer."""
    grown: dict[Any, Any] = {}
    for buffer, count in parts.items():
        whole = buffer.ty
        rows, *columns = whole.shape
        grown[buffer] = tirx.decl_buffer(
            [rows * count, *columns],
            whole.dtype,
            buffer.name,
            strides=list(whole.strides),
            scope=buffer.scope(),
        )
    return tvm_ffi.structural_map(body, [(Var, lambda var: grown.get(var, var))], order="post")

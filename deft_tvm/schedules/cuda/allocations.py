"""Where buffers are allocated in a lowered kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.s_tir import SBlock


def lift(block: SBlock, wanted: Callable[[Any], bool]) -> SBlock:
    """`block` with the wanted buffers of all blocks inside it as its own."""
    lifted: list[Any] = []

    def without(inner: SBlock) -> SBlock:
        mine = [buffer for buffer in inner.alloc_buffers if wanted(buffer)]
        lifted.extend(mine)
        kept = [buffer for buffer in inner.alloc_buffers if not wanted(buffer)]
        return with_allocations(inner, inner.body, kept) if mine else inner

    body = tvm_ffi.structural_map(block.body, [(SBlock, without)], order="post")
    return with_allocations(block, body, [*block.alloc_buffers, *dict.fromkeys(lifted)])


def with_allocations(block: SBlock, body: tirx.Stmt, buffers: list[Any]) -> SBlock:
    return SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        body,
        block.init,
        buffers,
        block.match_buffers,
        block.annotations,
    )


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.LiftRegisters")
def lift_registers(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Allocate what lives in registers once a kernel.

    TVM's merging of shared memory refuses a ``let`` that reads a buffer of its own scope.
    """

    def outermost(block: SBlock) -> SBlock:
        if _launches(block):
            return block
        return lift(block, _is_register)

    return func.with_body(tvm_ffi.structural_map(func.body, [(SBlock, outermost)], order="post"))


def _is_register(buffer: Any) -> bool:
    """Not those of TVM's reductions over threads: each use, unrolled, needs one of its own."""
    own = not buffer.name.startswith(("in_thread_", "cross_thread_"))
    return buffer.scope() == "local" and own


def _launches(block: SBlock) -> bool:
    """Whether the block stands around the threads, and not inside one."""
    found: list[Any] = []

    def look(loop: tirx.For) -> None:
        if loop.thread_binding is not None:
            found.append(loop)

    tvm_ffi.structural_walk(block.body, [(tirx.For, look)])
    return bool(found)

"""Where the rows of a thread's copies lie, looked up before the first of them.

A thread copies many rows, and reads of each in shared memory on which page it lies. Between two
copies it would wait for that: as far as ptxas knows, the copy before may have changed the table. A
schedule annotates the loop over a thread's copies; the pass here reads all rows' entries into
registers beforehand. Where rows lie evenly it takes faster copies, too.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import DataType, tirx, transform
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.script import tirx as T

from deft_tvm.schedules.cuda.statements import loop_like, substitute

LOOK_UP = "deft_tvm.look_up"
"""Annotation of the loop over a thread's copies."""
UNROLLED = tirx.ForKind.UNROLLED

EVEN = "deft_rows_are_even"
OF_ROW = {
    "deft_copy_16_bytes": "deft_copy_16_bytes_of_row",
    "deft_copy_16_bytes_later": "deft_copy_16_bytes_of_row_later",
}
"""Copies that may trust strides to be multiples of 16 bytes and below 2^31: then an address takes
two multiplications of 32 bits (which nvcc does not find by itself), and nothing is looked at for
each copy."""


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.LookUpFirst")
def look_up_first(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Rewrite the loops annotated with `LOOK_UP`, whose bodies are calls of copies by now."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, _looked_up)], order="post"))


def _looked_up(loop: tirx.For) -> tirx.Stmt:
    """A loop over copies with what it reads of shared tables read before, into registers."""
    if LOOK_UP not in loop.annotations or _has_guard(loop):
        return loop
    loads: list[Any] = []

    def note(load: Any) -> None:
        is_table = load.source.scope().startswith("shared") and load.source.ty.dtype == "int32"
        if is_table and not any(tvm_ffi.structural_equal(load, other) for other in loads):
            loads.append(load)

    tvm_ffi.structural_walk(loop.body, [(TensorLoad, note)])
    if not loads:
        return loop
    count = int(loop.extent)
    held = [
        tirx.decl_buffer([count], "int32", f"{load.source.name}_held", scope="local")
        for load in loads
    ]

    def place(load: Any) -> Any:
        for known, register in zip(loads, held, strict=True):
            if tvm_ffi.structural_equal(load, known):
                return tirx.BufferLoad(register, [loop.loop_var])
        return load

    reads = [
        tirx.BufferStore(register, load, [loop.loop_var])
        for load, register in zip(loads, held, strict=True)
    ]
    copies = tvm_ffi.structural_map(loop.body, [(TensorLoad, place)], order="post")
    first = loop_like(loop, tirx.SeqStmt(reads), UNROLLED)
    if (evenly := _evenly(loop, copies, held)) is None:
        body: tirx.Stmt = tirx.SeqStmt([first, loop_like(loop, copies, UNROLLED)])
    else:
        even, fast = evenly
        body = tirx.IfThenElse(even, tirx.SeqStmt([first, fast]), loop)
    block = SBlock([], [], [], "looked_up", body, None, held, [], {})
    return SBlockRealize([], True, block)


def _evenly(loop: tirx.For, copies: tirx.Stmt, held: list[Any]) -> tuple[Any, tirx.Stmt] | None:
    """Whether rows are even, and a faster loop over `copies` for then; None where there is none.

    Args:
        held: the registers with the table entries that they read.
    """
    calls: list[Any] = []
    tvm_ffi.structural_walk(copies, [(tirx.Evaluate, lambda node: calls.append(node.value))])
    if len(calls) != 1 or str(calls[0].args[0].value) not in OF_ROW:
        return None
    name, tile, address, text = calls[0].args
    row = address.args[0]
    places = [d for d, index in enumerate(row.indices) if _reads(index, held)]
    if len(places) != 2:
        return None
    element = DataType(str(row.source.ty.dtype)).itemsize
    zero = tirx.IntImm("int64", 0)
    origin = [zero if d in places else index for d, index in enumerate(row.indices)]
    first = T.address_of(tirx.BufferLoad(row.source, origin))
    strides = [row.source.ty.strides[d] * element for d in places]
    (page, page_stride), (slot, slot_stride) = (
        (tirx.Cast("int32", row.indices[d]), stride)
        for d, stride in zip(places, strides, strict=True)
    )
    fast = T.cuda.func_call(
        OF_ROW[str(name.value)],
        *(tile, first, page, page_stride, slot, slot_stride),
        source_code=str(text.value),
    )
    start = substitute(first, loop.loop_var, loop.min)
    even = T.cuda.func_call(EVEN, start, *strides, source_code=str(text.value), return_type="int32")
    return even != 0, loop_like(loop, tirx.Evaluate(fast), UNROLLED)


def _reads(index: Any, buffers: list[Any]) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(index, [(TensorLoad, lambda load: found.append(load.source))])
    return any(source.same_as(buffer) for source in found for buffer in buffers)


def _has_guard(loop: tirx.For) -> bool:
    """Whether some of its iterations may be left out, whose table entries may not be there."""
    found: list[Any] = []
    tvm_ffi.structural_walk(loop.body, [(tirx.IfThenElse, found.append)])
    tvm_ffi.structural_walk(
        loop.body,
        [(SBlockRealize, lambda r: None if _is_true(r.predicate) else found.append(r))],
    )
    return bool(found)


def _is_true(predicate: Any) -> bool:
    return isinstance(predicate, tirx.IntImm) and bool(int(predicate))

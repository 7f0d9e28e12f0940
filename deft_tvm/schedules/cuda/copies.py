"""Loads of cache tiles into shared memory, 16 bytes of the cache at a time.

TVM makes vector loads only of addresses that it can prove aligned, which free strides never are.
So a schedule annotates the loop over 16 bytes of a row, and the pass here replaces it by a device
function that looks at the address: one load where it is aligned, elements one after the other
where a cache is laid out oddly.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import TensorLoad, Var
from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import FP8_BITS, storage
from deft_tvm.schedules.cuda.threads import LANES, bind_threads
from deft_tvm.spec import DTYPE_BYTES, FP8

BYTES = 16
COPY = "deft_tvm.copy"
"""Annotation of a loop over 16 bytes of a cache row, with one of these values."""
NOW, LATER = 1, 2
LOOK_UP = "deft_tvm.look_up"
"""Annotation of the loop over a thread's copies: where all rows lie is read before the first."""

CUDA_TYPES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}

COPY_SOURCE = """
__device__ __forceinline__ void deft_copy_16_bytes(void* tile, const void* row) {
  if ((size_t)row % 16 == 0) {
    *(uint4*)tile = *(const uint4*)row;
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) ((unsigned short*)tile)[i] = ((const unsigned short*)row)[i];
  }
}
"""

ASYNCHRONOUS_SOURCE = """
__device__ __forceinline__ void deft_cp_async(void* tile, const void* row) {
  unsigned address = __cvta_generic_to_shared(tile);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(row) : "memory");
}
__device__ __forceinline__ void deft_copy_16_bytes_later(void* tile, const void* row) {
  if ((size_t)row % 16 == 0) {
    deft_cp_async(tile, row);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) ((unsigned short*)tile)[i] = ((const unsigned short*)row)[i];
  }
}
"""

WIDEN_SOURCE = """
__device__ __forceinline__ void deft_widen_16_bytes(float* tile, const %(type)s* row) {
  if ((size_t)row %% 16 == 0) {
    uint4 bits = *(const uint4*)row;
    const %(type)s* held = (const %(type)s*)&bits;
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[i] = (float)held[i];
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) tile[i] = (float)row[i];
  }
}
"""


# TVM compiles with --use_fast_math, where a subnormal float32 is 0: e4m3's are made of integers.
DECODE_SOURCE = """
__device__ __forceinline__ void %(name)s(%(tile)s* tile, const unsigned char* row) {
  uint4 bits;
  unsigned char* held = (unsigned char*)&bits;
  if ((size_t)row %% 16 == 0) {
    bits = *(const uint4*)row;
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) held[i] = row[i];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    unsigned sign = (held[i] & 0x80u) << 24, size = held[i] & 0x7fu;
    unsigned tiny = __float_as_uint((float)size * 0x1p-9f);
    unsigned found = size < 8u ? tiny : size == 0x7fu ? 0x7fc00000u : (size << 20) + (120u << 23);
    found |= sign;
    tile[i] = %(stored)s;
  }
}
"""


def whole_lanes(source: str, operand: str, width: int) -> int:
    """Elements of a `source` cache that one copy moves into a tile of `operand`; 1: no copies."""
    lanes = BYTES // DTYPE_BYTES[source]
    possible = source == FP8 or operand in (source, "float32")
    return lanes if width % lanes == 0 and possible else 1


def load_tile(sch: Schedule, block: str, warps: Any, lanes: int) -> None:
    """All threads load the block's two-dimensional tile, `lanes` elements at a time."""
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(block))[-2:])
    rounds, warp, lane, piece = sch.split(fused, [None, warps, LANES, lanes])
    bind_threads(sch, warp, lane)
    if lanes > 1:
        sch.annotate(rounds, LOOK_UP, 1)
        sch.annotate(piece, COPY, NOW)


def asynchronous(statement: tirx.Stmt) -> tirx.Stmt:
    """`statement` with copies that land at the next wait."""

    def later(loop: tirx.For) -> tirx.For:
        if COPY not in loop.annotations:
            return loop
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, loop.body, annotations={COPY: LATER}
        )

    return tvm_ffi.structural_map(statement, [(tirx.For, later)])


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.CopyWholeVectors")
def copy_whole_vectors(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Put device functions where loops are annotated with `COPY`."""
    body = tvm_ffi.structural_map(func.body, [(tirx.For, _copy)], order="post")
    return func.with_body(tvm_ffi.structural_map(body, [(tirx.For, _looked_up)], order="post"))


def _looked_up(loop: tirx.For) -> tirx.Stmt:
    """A loop over copies with what it reads of shared tables read before, into registers.

    Else each copy waits for a table that, as far as ptxas knows, the copy before may have changed.
    """
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
    body = tirx.SeqStmt([_unrolled(loop, tirx.SeqStmt(reads)), _unrolled(loop, copies)])
    block = SBlock([], [], [], "looked_up", body, None, held, [], {})
    return SBlockRealize([], True, block)


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


def _unrolled(loop: tirx.For, body: tirx.Stmt) -> tirx.For:
    """A loop with an index of its own."""
    index = Var(loop.loop_var.name, "int32")
    moved = tvm_ffi.structural_map(
        body, [(Var, lambda var: index if var.same_as(loop.loop_var) else var)]
    )
    return tirx.For(index, loop.min, loop.extent, tirx.ForKind.UNROLLED, moved)


def _copy(loop: tirx.For) -> tirx.Stmt:
    if COPY not in loop.annotations:
        return loop

    def first(var: Any) -> Any:
        return tirx.IntImm("int32", 0) if var.same_as(loop.loop_var) else var

    # The guard of a last, partial round stays around the call.
    body = tvm_ffi.structural_map(loop.body, [(Var, first)])
    later = int(loop.annotations[COPY]) == LATER

    def call(store: Any) -> tirx.Stmt:
        return _call(store, int(loop.extent), later)

    return tvm_ffi.structural_map(body, [(tirx.BufferStore, call)])


def _call(store: Any, lanes: int, later: bool) -> tirx.Stmt:
    """The device function for a store of the first of `lanes` elements."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(store.value, [(TensorLoad, loads.append)])
    # Decoding names the one element that it reads more than once.
    row = next(load for load in loads if load.source.scope() == "global")
    function, text = _device_function(str(row.source.ty.dtype), str(store.buffer.ty.dtype), later)
    # An access pointer, since TVM's barriers take no notice of a plain address.
    (offset,) = store.buffer.offset_of(store.indices)
    tile = store.buffer.access_ptr("w", offset=offset, extent=lanes)
    return tirx.Evaluate(T.cuda.func_call(function, tile, T.address_of(row), source_code=text))


def _device_function(source: str, tile: str, later: bool) -> tuple[str, str]:
    """Name and text of what moves 16 bytes of a `source` cache into a tile of `tile` elements."""
    if source == FP8_BITS:
        stored = {"float32": "__uint_as_float(found)", "uint16": "found >> 16"}[tile]
        kind = {"float32": "float", "uint16": "unsigned short"}[tile]
        name = f"deft_decode_16_bytes_to_{tile}"
        return name, DECODE_SOURCE % {"name": name, "tile": kind, "stored": stored}
    if storage(source) != tile:
        return "deft_widen_16_bytes", WIDEN_SOURCE % {"type": CUDA_TYPES[source]}
    if later:
        return "deft_copy_16_bytes_later", ASYNCHRONOUS_SOURCE
    return "deft_copy_16_bytes", COPY_SOURCE

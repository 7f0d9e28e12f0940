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
from tvm.ir import TensorLoad
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from deft_tvm.dtypes import DTYPE_BYTES, FP8
from deft_tvm.kernels.numerics import FP8_BITS, storage
from deft_tvm.schedules.cuda.lookups import LOOK_UP
from deft_tvm.schedules.cuda.statements import substitute
from deft_tvm.schedules.cuda.threads import LANES, bind_threads

BYTES = 16
COPY = "deft_tvm.copy"
"""Annotation of a loop over 16 bytes of a cache row, with one of these values."""
NOW, LATER = 1, 2
PERMUTED = "deft_tvm.permuted"
"""Annotation of the same loop: the 16-byte pieces of the tile's rows, 128 bytes each, are permuted,
as the hardware that multiplies tiles in shared memory reads them (PTX ISA, "swizzling modes"): no
eight rows then have theirs in the same banks."""

CUDA_TYPES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}

COPY_SOURCE = """
#ifndef DEFT_COPIES
#define DEFT_COPIES
__device__ __forceinline__ void deft_cp_async(void* tile, const void* row) {
  unsigned address = __cvta_generic_to_shared(tile);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(row) : "memory");
}
__device__ __forceinline__ void deft_copy_elements(void* tile, const void* row) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) ((unsigned short*)tile)[i] = ((const unsigned short*)row)[i];
}
__device__ __forceinline__ void deft_copy_16_bytes(void* tile, const void* row) {
  if ((size_t)row % 16 == 0) {
    *(uint4*)tile = *(const uint4*)row;
  } else {
    deft_copy_elements(tile, row);
  }
}
__device__ __forceinline__ void deft_copy_16_bytes_later(void* tile, const void* row) {
  if ((size_t)row % 16 == 0) {
    deft_cp_async(tile, row);
  } else {
    deft_copy_elements(tile, row);
  }
}
__device__ __forceinline__ int deft_rows_are_even(
    const void* first, int64_t page_stride, int64_t slot_stride) {
  bool aligned = ((size_t)first | (size_t)page_stride | (size_t)slot_stride) % 16 == 0;
  return aligned && page_stride >> 31 == 0 && slot_stride >> 31 == 0;
}
__device__ __forceinline__ size_t deft_row(
    const void* first, int page, int64_t page_stride, int slot, int64_t slot_stride) {
  size_t in_page, row;
  asm("mad.wide.s32 %0, %1, %2, %3;"
    : "=l"(in_page) : "r"(slot), "r"((int)slot_stride), "l"((size_t)first));
  asm("mad.wide.s32 %0, %1, %2, %3;"
    : "=l"(row) : "r"(page), "r"((int)page_stride), "l"(in_page));
  return row;
}
__device__ __forceinline__ void deft_copy_16_bytes_of_row(
    void* tile, const void* first, int page, int64_t page_stride, int slot, int64_t slot_stride) {
  size_t row = deft_row(first, page, page_stride, slot, slot_stride);
  *(uint4*)tile = *(const uint4*)row;
}
__device__ __forceinline__ void deft_copy_16_bytes_of_row_later(
    void* tile, const void* first, int page, int64_t page_stride, int slot, int64_t slot_stride) {
  deft_cp_async(tile, (const void*)deft_row(first, page, page_stride, slot, slot_stride));
}
#endif
"""
PERMUTED_SOURCE = """
__device__ __forceinline__ void* deft_permuted(void* piece) {
  unsigned address = __cvta_generic_to_shared(piece);
  return (char*)piece + (int)((address ^ (address >> 3 & 0x70)) - address);
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


def load_tile(
    sch: Schedule, block: str, warps: Any, lanes: int, when: int = NOW, permuted: bool = False
) -> None:
    """All threads load the block's two-dimensional tile, `lanes` elements at a time.

    Args:
        when: `LATER`: copies land at the next wait.
        permuted: each row's pieces, see `PERMUTED`.
    """
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(block))[-2:])
    rounds, warp, lane, piece = sch.split(fused, [None, warps, LANES, lanes])
    bind_threads(sch, warp, lane)
    if lanes > 1:
        sch.annotate(rounds, LOOK_UP, 1)
        sch.annotate(piece, COPY, when)
        if permuted:
            sch.annotate(piece, PERMUTED, 1)


def asynchronous(statement: tirx.Stmt) -> tirx.Stmt:
    """`statement` with copies that land at the next wait."""

    def later(loop: tirx.For) -> tirx.For:
        if COPY not in loop.annotations:
            return loop
        marks = {**loop.annotations, COPY: LATER}
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, loop.body, annotations=marks
        )

    return tvm_ffi.structural_map(statement, [(tirx.For, later)])


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.CopyWholeVectors")
def copy_whole_vectors(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Put device functions where loops are annotated with `COPY`."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, _copy)], order="post"))


def _copy(loop: tirx.For) -> tirx.Stmt:
    if COPY not in loop.annotations:
        return loop

    # The guard of a last, partial round stays around the call.
    body = substitute(loop.body, loop.loop_var, tirx.IntImm("int32", 0))
    later = int(loop.annotations[COPY]) == LATER
    permuted = PERMUTED in loop.annotations

    def call(store: Any) -> tirx.Stmt:
        return _call(store, int(loop.extent), later, permuted)

    return tvm_ffi.structural_map(body, [(tirx.BufferStore, call)])


def _call(store: Any, lanes: int, later: bool, permuted: bool) -> tirx.Stmt:
    """The device function for a store of the first of `lanes` elements."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(store.value, [(TensorLoad, loads.append)])
    # Decoding names the one element that it reads more than once.
    row = next(load for load in loads if load.source.scope() == "global")
    function, text = _device_function(str(row.source.ty.dtype), str(store.buffer.ty.dtype), later)
    if later:
        # A plain address, of which TVM's barriers take no notice: it would put one before every
        # use of the other half of the buffer. Who waits for copies has one of its own.
        tile = T.address_of(tirx.BufferLoad(store.buffer, store.indices))
    else:
        (offset,) = store.buffer.offset_of(store.indices)
        tile = store.buffer.access_ptr("w", offset=offset, extent=lanes)
    if permuted:
        tile = T.cuda.func_call(
            "deft_permuted", tile, source_code=PERMUTED_SOURCE, return_type="handle"
        )
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
        return "deft_copy_16_bytes_later", COPY_SOURCE
    return "deft_copy_16_bytes", COPY_SOURCE

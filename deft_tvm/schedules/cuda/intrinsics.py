"""Tensor core instructions as tensor intrinsics over whole warps.

A 16 × 16 tile lies in a warp as PTX lays out the operands of ``mma.m16n8k16`` (PTX ISA, "matrix
fragments for mma.m16n8k16"): 8 elements in each of 32 lanes. The accumulator's layout is also that
of the left factor, so that probabilities feed the second product where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm.script import tirx as T

from deft_tvm.dtypes import SHORT_DTYPE
from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import storage, widen
from deft_tvm.schedules.cuda.shares import FRAGMENT, QUAD_ROWS
from deft_tvm.schedules.cuda.threads import LANES, TILE_SCOPE
from deft_tvm.schedules.verbs import register

SIDE = 16
HELD = SIDE * SIDE // LANES

TENSOR_CORES = """
#ifndef DEFT_TENSOR_CORES_%(type)s
#define DEFT_TENSOR_CORES_%(type)s
__device__ __forceinline__ void deft_ldmatrix_%(type)s(unsigned* held, const void* row) {
  unsigned address = __cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%%0,%%1,%%2,%%3}, [%%4];"
    : "=r"(held[0]), "=r"(held[1]), "=r"(held[2]), "=r"(held[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void deft_ldmatrix_trans_%(type)s(unsigned* held, const void* row) {
  unsigned address = __cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%%0,%%1,%%2,%%3}, [%%4];"
    : "=r"(held[0]), "=r"(held[1]), "=r"(held[2]), "=r"(held[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void deft_mma_%(type)s(float* c, const unsigned* a, const unsigned* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.%(type)s.%(type)s.f32 "
    "{%%0,%%1,%%2,%%3}, {%%4,%%5,%%6,%%7}, {%%8,%%9}, {%%0,%%1,%%2,%%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void deft_load_%(type)s(void* fragment, const void* row) {
  deft_ldmatrix_%(type)s((unsigned*)fragment, row);
}
__device__ __forceinline__ void deft_multiply_%(type)s(float* c, const void* a, const void* row) {
  unsigned b[4];
  deft_ldmatrix_trans_%(type)s(b, row);
  deft_mma_%(type)s(c, (const unsigned*)a, b);
  deft_mma_%(type)s(c + 4, (const unsigned*)a, b + 2);
}
__device__ __forceinline__ void deft_multiply_transposed_%(type)s(
    float* c, const void* a, const void* row) {
  unsigned b[4];
  deft_ldmatrix_%(type)s(b, row);
  deft_mma_%(type)s(c, (const unsigned*)a, b);
  deft_mma_%(type)s(c + 4, (const unsigned*)a, b + 2);
}
#endif
"""


def fragment_of(i: Any, j: Any) -> tuple[Any, Any]:
    """(lane, register) of element (i, j) of an accumulator or a left factor."""
    return 4 * (i % 8) + j % 8 // 2, 4 * (j // 8) + i // 8 * 2 + j % 2


def fragments_of(width: int, shares: int = 1) -> Callable[[Any, Any], tuple[Any, ...]]:
    """The same for a matrix of tiles, `width` columns wide, whose columns `shares` warps have side
    by side: (tile row, share, tile column within it, lane, register) of element (i, j)."""
    own = width // SIDE // shares

    def place(i: Any, j: Any) -> tuple[Any, ...]:
        column = j // SIDE
        return i // SIDE, column // own, column % own, *fragment_of(i % SIDE, j % SIDE)

    return place


def rows_first(width: int, shares: int) -> Callable[[Any, Any], tuple[Any, ...]]:
    """The same elements row by row of a lane: (tile row, share, lane, which of the lane's two rows,
    tile column, which half of it, which of two neighbours) of element (i, j)."""
    own = width // SIDE // shares

    def place(i: Any, j: Any) -> tuple[Any, ...]:
        column = j // SIDE
        lane, _ = fragment_of(i % SIDE, j % SIDE)
        return i // SIDE, column // own, lane, i % SIDE // 8, column % own, j % SIDE // 8, j % 2

    return place


@cache
def fill_zero() -> str:
    """The intrinsic that clears an accumulator."""

    @script.prim_func(s_tir=True)
    def description(tile_handle: T.handle) -> None:
        tile = T.match_buffer(
            tile_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads()
            T.writes(tile[0:LANES, 0:HELD])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("fill"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    lane, register = T.meta_var(fragment_of(vi, vj))
                    T.reads()
                    T.writes(tile[lane, register])
                    tile[lane, register] = T.float32(0)

    @script.prim_func(s_tir=True)
    def implementation(tile_handle: T.handle) -> None:
        tile = T.match_buffer(
            tile_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads()
            T.writes(tile[0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                for register in T.unroll(HELD):
                    tile[lane, register] = T.float32(0)

    return register("deft_tvm.fill_zero", description, implementation)


@cache
def load_left(operand: str) -> str:
    """The intrinsic that loads a left factor's tile out of shared memory."""
    element = storage(operand)
    kind = SHORT_DTYPE[operand]
    text = TENSOR_CORES % {"type": kind}

    @script.prim_func(s_tir=True)
    def description(tile_handle: T.handle, fragment_handle: T.handle) -> None:
        tile = T.match_buffer(tile_handle, (SIDE, SIDE), element, scope=TILE_SCOPE, offset_factor=1)
        fragment = T.match_buffer(
            fragment_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads(tile[0:SIDE, 0:SIDE])
            T.writes(fragment[0:LANES, 0:HELD])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("load"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    lane, register = T.meta_var(fragment_of(vi, vj))
                    T.reads(tile[vi, vj])
                    T.writes(fragment[lane, register])
                    fragment[lane, register] = tile[vi, vj]

    @script.prim_func(s_tir=True)
    def implementation(tile_handle: T.handle, fragment_handle: T.handle) -> None:
        pitch = T.int32()
        tile = T.match_buffer(
            tile_handle,
            (SIDE, SIDE),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[pitch, T.int32(1)],
        )
        fragment = T.match_buffer(
            fragment_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads(tile[0:SIDE, 0:SIDE])
            T.writes(fragment[0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        f"deft_load_{kind}",
                        T.address_of(fragment[lane, 0]),
                        tile.access_ptr("r", offset=lane % 16 * pitch + lane // 16 * 8),
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.load_left_{operand}", description, implementation)


@cache
def multiply_transposed(operand: str) -> str:
    """The intrinsic that adds to sums a left factor times a shared tile [n, k]."""
    element, kind = storage(operand), SHORT_DTYPE[operand]
    text = TENSOR_CORES % {"type": kind}

    @script.prim_func(s_tir=True)
    def description(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a = T.match_buffer(a_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(b_handle, (SIDE, SIDE), element, scope=TILE_SCOPE, offset_factor=1)
        c = T.match_buffer(c_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        with T.sblock("root"):
            T.reads(c[0:LANES, 0:HELD], a[0:LANES, 0:HELD], b[0:SIDE, 0:SIDE])
            T.writes(c[0:LANES, 0:HELD])
            for i, n, k in T.grid(SIDE, SIDE, SIDE):
                with T.sblock("multiply"):
                    vi, vn, vk = T.axis.remap("SSR", [i, n, k])
                    lane_c, register_c = T.meta_var(fragment_of(vi, vn))
                    lane_a, register_a = T.meta_var(fragment_of(vi, vk))
                    T.reads(c[lane_c, register_c], a[lane_a, register_a], b[vn, vk])
                    T.writes(c[lane_c, register_c])
                    c[lane_c, register_c] = c[lane_c, register_c] + widen(
                        a[lane_a, register_a], operand
                    ) * widen(b[vn, vk], operand)

    @script.prim_func(s_tir=True)
    def implementation(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        pitch = T.int32()
        a = T.match_buffer(a_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(
            b_handle,
            (SIDE, SIDE),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[pitch, T.int32(1)],
        )
        c = T.match_buffer(c_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        with T.sblock("root"):
            T.reads(c[0:LANES, 0:HELD], a[0:LANES, 0:HELD], b[0:SIDE, 0:SIDE])
            T.writes(c[0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        f"deft_multiply_transposed_{kind}",
                        T.address_of(c[lane, 0]),
                        T.address_of(a[lane, 0]),
                        b.access_ptr(
                            "r", offset=(lane // 16 * 8 + lane % 8) * pitch + lane % 16 // 8 * 8
                        ),
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.multiply_transposed_{operand}", description, implementation)


@cache
def multiply_on(operand: str) -> str:
    """The intrinsic that adds to sums a left factor times a shared tile [k, n].

    What the sums began with, an output and the factors of its rows, TVM leaves among what each step
    reads; a step reads none of it.
    """
    element, kind = storage(operand), SHORT_DTYPE[operand]
    text = TENSOR_CORES % {"type": kind}

    @script.prim_func(s_tir=True)
    def description(
        old_handle: T.handle,
        factor_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        c_handle: T.handle,
    ) -> None:
        old = T.match_buffer(old_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        factor = T.match_buffer(factor_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        a = T.match_buffer(a_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(b_handle, (SIDE, SIDE), element, scope=TILE_SCOPE, offset_factor=1)
        c = T.match_buffer(c_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        with T.sblock("root"):
            T.reads(
                c[0:LANES, 0:HELD],
                old[0:LANES, 0:HELD],
                factor[0:SIDE],
                a[0:LANES, 0:HELD],
                b[0:SIDE, 0:SIDE],
            )
            T.writes(c[0:LANES, 0:HELD])
            for i, n, k in T.grid(SIDE, SIDE, SIDE):
                with T.sblock("multiply"):
                    vi, vn, vk = T.axis.remap("SSR", [i, n, k])
                    lane_c, register_c = T.meta_var(fragment_of(vi, vn))
                    lane_a, register_a = T.meta_var(fragment_of(vi, vk))
                    T.reads(
                        c[lane_c, register_c],
                        old[lane_c, register_c],
                        factor[vi],
                        a[lane_a, register_a],
                        b[vk, vn],
                    )
                    T.writes(c[lane_c, register_c])
                    c[lane_c, register_c] = c[lane_c, register_c] + widen(
                        a[lane_a, register_a], operand
                    ) * widen(b[vk, vn], operand)

    @script.prim_func(s_tir=True)
    def implementation(
        old_handle: T.handle,
        factor_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        c_handle: T.handle,
    ) -> None:
        pitch = T.int32()
        old = T.match_buffer(old_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        factor = T.match_buffer(factor_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        a = T.match_buffer(a_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(
            b_handle,
            (SIDE, SIDE),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[pitch, T.int32(1)],
        )
        c = T.match_buffer(c_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        with T.sblock("root"):
            T.reads(
                c[0:LANES, 0:HELD],
                old[0:LANES, 0:HELD],
                factor[0:SIDE],
                a[0:LANES, 0:HELD],
                b[0:SIDE, 0:SIDE],
            )
            T.writes(c[0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        f"deft_multiply_{kind}",
                        T.address_of(c[lane, 0]),
                        T.address_of(a[lane, 0]),
                        b.access_ptr("r", offset=lane % 16 * pitch + lane // 16 * 8),
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.multiply_on_{operand}", description, implementation)

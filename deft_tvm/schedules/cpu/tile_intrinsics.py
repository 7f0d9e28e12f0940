"""What the functions of `amx` compute, as tensor intrinsics that schedules put in their place.

    enter_tiles, leave_tiles   configure the tile registers, and undo it
    tile_zeros                 the accumulators of a block become 0
    tile_products              C[deep, rows] += A[deep, 32] · B[32, rows], B in pairs: [16, rows, 2]
    tile_sums                  the accumulators are written to memory
    transpose_tokens           32 tokens × 16 columns turned round

The accumulators' buffer in TensorIR is never touched: its name stands for the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import widen
from deft_tvm.kernels.stages import UNIT_STATE_BYTES
from deft_tvm.schedules.cpu.amx import DEPTH, EDGE
from deft_tvm.schedules.verbs import register


@cache
def enter_tiles() -> str:
    """Intrinsic: configure the tile registers, and keep how they were."""
    return _at_state("deft_enter_tiles", lambda byte: T.uint8(0), reads=False)


@cache
def leave_tiles() -> str:
    """Intrinsic: configure them as they were: torch's own products may count on that."""
    return _at_state("deft_leave_tiles", lambda byte: byte + T.uint8(1), reads=True)


def _at_state(function: str, changed: Callable[[Expr], Expr], reads: bool) -> str:
    """In place of a block of the computation that only marks a unit's beginning or end."""

    @script.prim_func(s_tir=True)
    def description(s: T.handle) -> None:
        S = T.match_buffer(s, (UNIT_STATE_BYTES,), "uint8", offset_factor=1)
        with T.sblock("root"):
            if reads:
                T.reads(S[0:UNIT_STATE_BYTES])
            else:
                T.reads()
            T.writes(S[0:UNIT_STATE_BYTES])
            for n in range(UNIT_STATE_BYTES):
                with T.sblock("byte"):
                    vn = T.axis.spatial(UNIT_STATE_BYTES, n)
                    S[vn] = changed(S[vn])

    @script.prim_func(s_tir=True)
    def implementation(s: T.handle) -> None:
        S = T.match_buffer(s, (UNIT_STATE_BYTES,), "uint8", offset_factor=1)
        with T.sblock("root"):
            if reads:
                T.reads(S[0:UNIT_STATE_BYTES])
            else:
                T.reads()
            T.writes(S[0:UNIT_STATE_BYTES])
            T.evaluate(T.call_extern("int32", function, T.address_of(S[0])))

    return register(function, description, implementation)


@cache
def tile_zeros(deep: int, rows: int) -> str:
    """Intrinsic: zeros in the accumulators of `deep` × `rows`."""
    function = _named("deft_tile_zeros", deep, rows)

    @script.prim_func(s_tir=True)
    def description(c: T.handle) -> None:
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:deep, 0:rows])
            for j, i in T.grid(deep, rows):
                with T.sblock("zero"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vj, vi] = T.float32(0)

    @script.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:deep, 0:rows])
            T.evaluate(T.call_extern("int32", function))

    return register(function, description, implementation)


@cache
def tile_products(deep: int, rows: int) -> str:
    """Intrinsic: 32 factors of each of `deep` × `rows` sums."""
    function = _named("deft_tile_products", deep, rows)

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (deep, DEPTH), "uint16", offset_factor=1)
        B = T.match_buffer(b, (DEPTH // 2, rows, 2), "uint16", offset_factor=1)
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:deep, 0:rows], B[0 : DEPTH // 2, 0:rows, 0:2], A[0:deep, 0:DEPTH])
            T.writes(C[0:deep, 0:rows])
            for j, i, k in T.grid(deep, rows, DEPTH):
                with T.sblock("product"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vj, vi] = C[vj, vi] + widen(B[vk // 2, vi, vk % 2], "bfloat16") * widen(
                        A[vj, vk], "bfloat16"
                    )

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        stride_a, stride_b = T.int32(), T.int32()
        A = T.match_buffer(a, (deep, DEPTH), "uint16", offset_factor=1, strides=[stride_a, 1])
        B = T.match_buffer(
            b, (DEPTH // 2, rows, 2), "uint16", offset_factor=1, strides=[stride_b, 2, 1]
        )
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:deep, 0:rows], B[0 : DEPTH // 2, 0:rows, 0:2], A[0:deep, 0:DEPTH])
            T.writes(C[0:deep, 0:rows])
            T.evaluate(
                T.call_extern(
                    "int32",
                    function,
                    T.address_of(A[0, 0]),
                    T.Cast("int64", stride_a * 2),
                    T.address_of(B[0, 0, 0]),
                    T.Cast("int64", stride_b * 2),
                )
            )

    return register(function, description, implementation)


@cache
def tile_sums(deep: int, rows: int) -> str:
    """Intrinsic: the accumulators of `deep` × `rows` written to memory."""
    function = _named("deft_tile_sums", deep, rows)

    @script.prim_func(s_tir=True)
    def description(c: T.handle, d: T.handle) -> None:
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        D = T.match_buffer(d, (deep, rows), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:deep, 0:rows])
            T.writes(D[0:deep, 0:rows])
            for j, i in T.grid(deep, rows):
                with T.sblock("sum"):
                    vj, vi = T.axis.remap("SS", [j, i])
                    D[vj, vi] = C[vj, vi]

    @script.prim_func(s_tir=True)
    def implementation(c: T.handle, d: T.handle) -> None:
        stride = T.int32()
        C = T.match_buffer(c, (deep, rows), "float32", offset_factor=1)
        D = T.match_buffer(d, (deep, rows), "float32", offset_factor=1, strides=[stride, 1])
        with T.sblock("root"):
            T.reads(C[0:deep, 0:rows])
            T.writes(D[0:deep, 0:rows])
            T.evaluate(
                T.call_extern("int32", function, T.address_of(D[0, 0]), T.Cast("int64", stride * 4))
            )

    return register(function, description, implementation)


@cache
def transpose_tokens() -> str:
    """Intrinsic: 32 tokens of 16 sixteen-bit elements to 16 rows of 32 tokens."""

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (DEPTH, EDGE), "uint16", offset_factor=1)
        B = T.match_buffer(b, (EDGE, DEPTH), "uint16", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:DEPTH, 0:EDGE])
            T.writes(B[0:EDGE, 0:DEPTH])
            for j, d in T.grid(DEPTH, EDGE):
                with T.sblock("element"):
                    vj, vd = T.axis.remap("SS", [j, d])
                    B[vd, vj] = A[vj, vd]

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        stride_a, stride_b = T.int32(), T.int32()
        A = T.match_buffer(a, (DEPTH, EDGE), "uint16", offset_factor=1, strides=[stride_a, 1])
        B = T.match_buffer(b, (EDGE, DEPTH), "uint16", offset_factor=1, strides=[stride_b, 1])
        with T.sblock("root"):
            T.reads(A[0:DEPTH, 0:EDGE])
            T.writes(B[0:EDGE, 0:DEPTH])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "deft_transpose",
                    T.address_of(B[0, 0]),
                    T.Cast("int64", stride_b * 2),
                    T.address_of(A[0, 0]),
                    T.Cast("int64", stride_a * 2),
                )
            )

    return register("deft_transpose", description, implementation)


def _named(function: str, deep: int, rows: int) -> str:
    """The LLVM function for a block, whose name counts tiles."""
    return f"{function}_{deep // EDGE}_{rows // EDGE}"

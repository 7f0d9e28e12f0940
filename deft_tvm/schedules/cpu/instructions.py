"""CPU instructions that TVM has no name for, as LLVM functions and tensor intrinsics over them.

The LLVM text goes into a module through ``pragma_import_llvm`` and is inlined. It sees bfloat16
vectors before TVM's legalisation can turn them into float32 ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from functools import partial as bind

from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import narrow, widen
from deft_tvm.schedules.cpu.vector import REGISTERS
from deft_tvm.schedules.verbs import register

LANES = 16

_INTERLEAVE = ", ".join(f"i32 {i}, i32 {i + LANES}" for i in range(LANES))

BFLOAT16_LLVM = f"""
define i32 @deft_dot_pairs(ptr %c, ptr %b, ptr %a) alwaysinline {{
  %acc = load <16 x float>, ptr %c, align 4
  %one = load i32, ptr %a, align 2
  %first = insertelement <16 x i32> poison, i32 %one, i32 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %pair = bitcast <16 x i32> %all to <32 x bfloat>
  %rows = load <32 x bfloat>, ptr %b, align 2
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %acc, <32 x bfloat> %rows, <32 x bfloat> %pair)
  store <16 x float> %sum, ptr %c, align 4
  ret i32 0
}}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define i32 @deft_interleave(ptr %o, ptr %x, ptr %y) alwaysinline {{
  %even = load <16 x i16>, ptr %x, align 2
  %odd = load <16 x i16>, ptr %y, align 2
  %pairs = shufflevector <16 x i16> %even, <16 x i16> %odd, <32 x i32> <{_INTERLEAVE}>
  store <32 x i16> %pairs, ptr %o, align 2
  ret i32 0
}}

define i32 @deft_narrow_pairs(ptr %o, ptr %x, ptr %y) alwaysinline {{
  %even = load <16 x float>, ptr %x, align 4
  %odd = load <16 x float>, ptr %y, align 4
  %both = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(
    <16 x float> %odd, <16 x float> %even)
  %pairs = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <{_INTERLEAVE}>
  store <32 x bfloat> %pairs, ptr %o, align 2
  ret i32 0
}}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
"""


@cache
def dot_pairs(pair_first: bool = False) -> str:
    """Intrinsic: 16 pairs times one pair of bfloat16, added to 16 float32 (``vdpbf16ps``).

    `pair_first` is the order of the factors in the block that is replaced: it must be met.
    """

    def times(one: Expr, other: Expr) -> Expr:
        one, other = widen(one, "bfloat16"), widen(other, "bfloat16")
        return other * one if pair_first else one * other

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (16, 2), "uint16", offset_factor=1)
        B = T.match_buffer(b, (2,), "uint16", offset_factor=1)
        C = T.match_buffer(c, (16,), "float32", offset_factor=1, scope=REGISTERS)
        with T.sblock("root"):
            if pair_first:
                T.reads(C[0:16], B[0:2], A[0:16, 0:2])
            else:
                T.reads(C[0:16], A[0:16, 0:2], B[0:2])
            T.writes(C[0:16])
            for i, r in T.grid(16, 2):
                with T.sblock("pair"):
                    vi, vr = T.axis.remap("SR", [i, r])
                    C[vi] = C[vi] + times(A[vi, vr], B[vr])

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (16, 2), "uint16", offset_factor=1)
        B = T.match_buffer(b, (2,), "uint16", offset_factor=1)
        C = T.match_buffer(c, (16,), "float32", offset_factor=1, scope=REGISTERS)
        with T.sblock("root"):
            if pair_first:
                T.reads(C[0:16], B[0:2], A[0:16, 0:2])
            else:
                T.reads(C[0:16], A[0:16, 0:2], B[0:2])
            T.writes(C[0:16])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "deft_dot_pairs",
                    T.address_of(C[0]),
                    T.address_of(A[0, 0]),
                    T.address_of(B[0]),
                )
            )

    name = "deft_dot_pair_first" if pair_first else "deft_dot_pairs"
    return register(name, description, implementation)


@cache
def interleave() -> str:
    """Intrinsic: two rows of 16 sixteen-bit elements into 16 pairs."""
    return _two_rows_to_pairs("deft_interleave", "uint16", lambda bits: bits, rows_first=True)


@cache
def narrow_pairs() -> str:
    """Intrinsic: two rows of 16 float32 rounded to bfloat16, as 16 pairs (``vcvtne2ps2bf16``)."""
    rounded = bind(narrow, operand="bfloat16")
    return _two_rows_to_pairs("deft_narrow_pairs", "float32", rounded, rows_first=False)


def _two_rows_to_pairs(
    function: str, source: str, element: Callable[[Expr], Expr], *, rows_first: bool
) -> str:
    """Pair i holds ``element`` of entry i of the first row, then of the second.

    `rows_first` is the order of the axes of the block that is replaced: it must be met.
    """

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (2, 16), source, offset_factor=1)
        B = T.match_buffer(b, (1, 16, 2), "uint16", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:2, 0:16])
            T.writes(B[0, 0:16, 0:2])
            for r, i in T.grid(2, 16):
                with T.sblock("pair"):
                    if rows_first:
                        vr, vi = T.axis.remap("SS", [r, i])
                        B[0, vi, vr] = element(A[vr, vi])
                    else:
                        vi, vr = T.axis.remap("SS", [i, r])
                        B[0, vi, vr] = element(A[vr, vi])

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        s0 = T.int32()
        A = T.match_buffer(a, (2, 16), source, offset_factor=1, strides=[s0, 1])
        B = T.match_buffer(b, (1, 16, 2), "uint16", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:2, 0:16])
            T.writes(B[0, 0:16, 0:2])
            T.evaluate(
                T.call_extern(
                    "int32",
                    function,
                    T.address_of(B[0, 0, 0]),
                    T.address_of(A[0, 0]),
                    T.address_of(A[1, 0]),
                )
            )

    return register(function, description, implementation)

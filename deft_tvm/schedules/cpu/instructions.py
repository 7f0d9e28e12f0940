"""CPU instructions that TVM has no name for, as LLVM functions and tensor intrinsics over them.

The LLVM text goes into a module through ``pragma_import_llvm`` and is inlined. It sees bfloat16
vectors before TVM's legalisation can turn them into float32 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from functools import partial as bind

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import narrow, storage, widen
from deft_tvm.schedules.verbs import power_of_two_in

LANES = 16

_INTERLEAVE = ", ".join(f"i32 {i}, i32 {i + LANES}" for i in range(LANES))

DPBF16PS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""

BFLOAT16_LLVM = f"""
define i32 @deft_dot_pairs(ptr %c, ptr %b, ptr %a) alwaysinline {{
  %acc = load <16 x float>, ptr %c, align 4
  %one = load i32, ptr %a, align 2
  %first = insertelement <16 x i32> poison, i32 %one, i32 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %pair = bitcast <16 x i32> %all to <32 x bfloat>
  %rows = load <32 x bfloat>, ptr %b, align 2
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %acc, <32 x bfloat> %pair, <32 x bfloat> %rows)
  store <16 x float> %sum, ptr %c, align 4
  ret i32 0
}}
{DPBF16PS}
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


def dot_name(width: int, operand: str) -> str:
    return f"deft_dot_{width}_{operand}"


def dot_llvm(widths: Iterable[int], lanes: int, operand: str) -> str:
    """The functions ``dot_name(width, operand)(c, a, b)``: c += Σ_d a_d · b_d.

    float32 rows are multiplied up to `lanes` at a time, bfloat16 rows 32 at a time.
    """
    unique = sorted(set(widths))
    if operand == "bfloat16":
        functions = [_dot_function(w, 16, operand) for w in unique]
        return "".join(functions) + DPBF16PS + _reduce_add(16)
    steps = {width: power_of_two_in(width, lanes) for width in unique}
    functions = [_dot_function(width, step, operand) for width, step in steps.items()]
    return "".join(functions) + "".join(_fma(n) + _reduce_add(n) for n in {*steps.values()})


def _dot_function(width: int, lanes: int, operand: str) -> str:
    """Two chains of multiply-adds, which hide each other's latency, then one sum across lanes."""
    vector, paired = f"<{lanes} x float>", operand == "bfloat16"
    element, step = ("bfloat", 2 * lanes) if paired else ("float", lanes)
    body = []
    for n in range(width // step):
        for row in "ab":
            body += [
                f"%{row}p{n} = getelementptr {element}, ptr %{row}, i64 {n * step}",
                f"%{row}{n} = load <{step} x {element}>, ptr %{row}p{n}, align 2",
            ]
        so_far = "zeroinitializer" if n < 2 else f"%s{n - 2}"
        factors = f"<{step} x {element}> %a{n}, <{step} x {element}> %b{n}"
        body.append(
            f"%s{n} = call {vector} @llvm.x86.avx512bf16.dpbf16ps.512({vector} {so_far}, {factors})"
            if paired
            else f"%s{n} = call {vector} @llvm.fma.v{lanes}f32({factors}, {vector} {so_far})"
        )
    last = width // step - 1
    total = f"%s{last}"
    if last:
        body.append(f"%both = fadd {vector} %s{last - 1}, %s{last}")
        total = "%both"
    lines = "\n  ".join(body)
    return f"""
define i32 @{dot_name(width, operand)}(ptr %c, ptr %a, ptr %b) alwaysinline {{
  {lines}
  %old = load float, ptr %c, align 4
  %sum = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float %old, {vector} {total})
  store float %sum, ptr %c, align 4
  ret i32 0
}}
"""


def _fma(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    return f"declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})\n"


def _reduce_add(lanes: int) -> str:
    return f"declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, <{lanes} x float>)\n"


@cache
def dot_pairs() -> str:
    """Intrinsic: 16 rows times one pair of bfloat16, added to 16 float32 (``vdpbf16ps``)."""

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (16, 2), "uint16", offset_factor=1)
        B = T.match_buffer(b, (2,), "uint16", offset_factor=1)
        C = T.match_buffer(c, (16,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:16], A[0:16, 0:2], B[0:2])
            T.writes(C[0:16])
            for i, r in T.grid(16, 2):
                with T.sblock("pair"):
                    vi, vr = T.axis.remap("SR", [i, r])
                    C[vi] = C[vi] + widen(A[vi, vr], "bfloat16") * widen(B[vr], "bfloat16")

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (16, 2), "uint16", offset_factor=1)
        B = T.match_buffer(b, (2,), "uint16", offset_factor=1)
        C = T.match_buffer(c, (16,), "float32", offset_factor=1)
        with T.sblock("root"):
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

    return register("deft_dot_pairs", description, implementation)


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

    @T.prim_func(s_tir=True)
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

    @T.prim_func(s_tir=True)
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


@cache
def dot(width: int, operand: str) -> str:
    """Intrinsic: the scalar product of two rows of `width` elements, added to one float32."""
    function = dot_name(width, operand)
    TILE = storage(operand)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (width,), TILE, offset_factor=1)
        B = T.match_buffer(b, (width,), TILE, offset_factor=1)
        C = T.match_buffer(c, (1,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0], A[0:width], B[0:width])
            T.writes(C[0])
            for d in range(width):
                with T.sblock("product"):
                    vd = T.axis.reduce(width, d)
                    C[0] = C[0] + widen(A[vd], operand) * widen(B[vd], operand)

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (width,), TILE, offset_factor=1)
        B = T.match_buffer(b, (width,), TILE, offset_factor=1)
        C = T.match_buffer(c, (1,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0], A[0:width], B[0:width])
            T.writes(C[0])
            T.evaluate(
                T.call_extern(
                    "int32",
                    function,
                    T.address_of(C[0]),
                    T.address_of(A[0]),
                    T.address_of(B[0]),
                )
            )

    return register(function, description, implementation)


def register(name: str, description: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    """A tensor intrinsic of TVM's, replaced if it was there; its name."""
    TensorIntrin.register(name, description, implementation, override=True)
    return name

"""Maximum and sum of a row that lies in memory, by halves.

As a loop LLVM takes the elements one after another, since the order of a float's sum matters: of 32
tokens that is a chain of 32 additions, by halves one of five.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import Schedule
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.schedules.verbs import register


def reductions_llvm(length: int) -> str:
    """The functions ``deft_max_<length>(c, x)`` and ``deft_sum_…``: c[0] = max(c[0], x), or +."""
    return _function("max", length) + _function("sum", length)


def reduce_rows(sch: Schedule, length: int) -> None:
    """Both reductions of the softmax over rows of `length` tokens, a power of two."""
    for block_name, name in (("row_max", "max"), ("row_sum", "sum")):
        block = sch.get_sblock(block_name)
        tokens = sch.get_loops(block)[-1]
        sch.decompose_reduction(block, tokens)
        sch.tensorize(tokens, _reduction(name, length))


def _function(name: str, length: int) -> str:
    lines, row = [], f"%x{length}"
    half = length // 2
    while half:
        wide, narrow = f"<{2 * half} x float>", f"<{half} x float>"
        for part, first in (("low", 0), ("high", half)):
            mask = ", ".join(f"i32 {i}" for i in range(first, first + half))
            lines.append(
                f"%{part}{half} = shufflevector {wide} {row}, {wide} poison, "
                f"<{half} x i32> <{mask}>"
            )
        lines += _combined(name, f"%x{half}", narrow, f"%low{half}", f"%high{half}")
        row, half = f"%x{half}", half // 2
    lines.append(f"%one = extractelement <1 x float> {row}, i32 0")
    lines += _combined(name, "%new", "float", "%old", "%one")
    body = "\n  ".join(lines)
    return f"""
define i32 @deft_{name}_{length}(ptr %c, ptr %x) alwaysinline {{
  %x{length} = load <{length} x float>, ptr %x, align 4
  %old = load float, ptr %c, align 4
  {body}
  store float %new, ptr %c, align 4
  ret i32 0
}}
"""


def _combined(name: str, made: str, kind: str, one: str, other: str) -> list[str]:
    if name == "sum":
        return [f"{made} = fadd {kind} {one}, {other}"]
    bits = kind.replace("float", "i1")
    return [
        f"{made}_above = fcmp ogt {kind} {one}, {other}",
        f"{made} = select {bits} {made}_above, {kind} {one}, {kind} {other}",
    ]


@cache
def _reduction(name: str, length: int) -> str:
    """Intrinsic: a row of float32 into one."""
    function = f"deft_{name}_{length}"
    combine = T.max if name == "max" else lambda one, other: one + other

    @script.prim_func(s_tir=True)
    def description(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (length,), "float32", offset_factor=1)
        C = T.match_buffer(c, (1,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0], A[0:length])
            T.writes(C[0])
            for j in range(length):
                with T.sblock("reduce"):
                    vj = T.axis.reduce(length, j)
                    C[0] = combine(C[0], A[vj])

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (length,), "float32", offset_factor=1)
        C = T.match_buffer(c, (1,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0], A[0:length])
            T.writes(C[0])
            T.evaluate(T.call_extern("int32", function, T.address_of(C[0]), T.address_of(A[0])))

    return register(function, description, implementation)

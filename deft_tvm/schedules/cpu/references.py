"""Rows of a tile that stay where they are: the tile keeps their addresses.

Rows lie scattered in pages. What reads each of them once gains nothing by a copy that puts one
after another, which took 30 % of the instructions of a kernel of four rows (AMD EPYC Zen 4,
2026-11-28), nor by one that converts them, which took 11 % of one sequence's time in bfloat16 on a
CPU without such instructions (Zen 1, 2026-11-28). The tile is as large as before, and holds the
address of a row in the row's first bytes; only functions that know of it read such a tile.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import Schedule
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import narrow, storage
from deft_tvm.schedules.verbs import register
from deft_tvm.spec import AttentionSpec

TABLES = ("page", "slot")
"""What a load reads beside the cache."""

REFERENCES_LLVM = """
define i32 @deft_refer(ptr %tile, ptr %row) alwaysinline {
  store ptr %row, ptr %tile, align 2
  ret i32 0
}
"""


def stored_where(spec: AttentionSpec, load: str, operand: str) -> str:
    """The type of the rows that block `load` puts into a tile, if they may stay where they are.

    Products of `operand` must take that type: float32's take any but 8 bits, which have a scale.
    Rows of V may not stay: the output's product is no such function. Those of a tile are of 8
    bytes or more. Otherwise empty.
    """
    number = {"load_k": spec.k.buffer, "load_rope": spec.rope}.get(load)
    if number is None or spec.buffers[number].scaled:
        return ""
    stored = spec.buffers[number].dtype
    return stored if operand in ("float32", stored) else ""


def refer_to_rows(sch: Schedule, load: str, width: int, stored: str, operand: str) -> None:
    """Keep the address of each row instead of a copy."""
    block = sch.get_sblock(load)
    # The intrinsic's description is of one row, wherever the tables say that it lies.
    tables = [n for n, read in enumerate(sch.get(block).reads) if read.source.name in TABLES]
    sch.unsafe_hide_buffer_access(block, "read", tables)
    sch.tensorize(sch.get_loops(block)[-1], _refer(width, stored, operand))


@cache
def _refer(width: int, stored: str, operand: str) -> str:
    """Intrinsic: a row of `width` elements, which becomes one of a tile of `operand`."""
    TILE = storage(operand)

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (width,), stored, offset_factor=1)
        B = T.match_buffer(b, (width,), TILE, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:width])
            T.writes(B[0:width])
            for d in range(width):
                with T.sblock("element"):
                    vd = T.axis.spatial(width, d)
                    B[vd] = narrow(A[vd], operand)

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (width,), stored, offset_factor=1)
        B = T.match_buffer(b, (width,), TILE, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:width])
            T.writes(B[0:width])
            T.evaluate(T.call_extern("int32", "deft_refer", T.address_of(B[0]), T.address_of(A[0])))

    return register(f"deft_refer_{width}_{stored}_{operand}", description, implementation)

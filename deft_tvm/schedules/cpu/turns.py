"""Square blocks turned round in registers, where rows in memory become vector lanes or lanes rows.

One element at a time, the queries of an item and its output take as long as 64 tokens of both
products. In blocks, an item of 128 rows and 64 tokens takes 0.78 of that time, and one of 320
tokens 0.92 (GQA in float32 and bfloat16, AMD EPYC Zen 4, 2026-11-27).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.schedules.cpu.pairs import pairs_of_second
from deft_tvm.schedules.verbs import register, swap, vectorize_last


def turn_rows(sch: Schedule, block: str, lanes: int, paired: bool) -> LoopRV:
    """Let `block`, which loads rows, fill a few rows as they lie, and turn these.

    for i, d: B[d, i] = f(i, d)
    → for i/lanes:  for i, d: b[i, d] = f(i, d);  for d/lanes: B[d…, i…] = b[i…, d…] turned round

    Args:
        sch: the schedule; the block's result is not transposed yet.
        block: two innermost loops over rows and columns.
        lanes: of a vector, which divide the rows; columns are whole blocks, see `whole_blocks`.
        paired: two neighbouring columns of 16 bits stay beside each other.

    Returns:
        The loop over vectors of rows.
    """
    load = sch.get_sblock(block)
    turned = sch.cache_write(load, 0, "global")
    sch.transform_layout(turned, ("write", 0), pairs_of_second if paired else swap)
    row, column = sch.get_loops(turned)[-2:]
    rows, row = sch.split(row, [None, lanes])
    columns, column = sch.split(column, [None, 2 * lanes if paired else lanes])
    sch.reorder(rows, columns, row, column)
    sch.compute_at(load, rows)
    vectorize_last(sch, block, lanes)
    sch.tensorize(row, _turned_pairs(lanes) if paired else _turned(lanes))
    return rows


def turn_lanes(sch: Schedule, block: str, matrix: str, lanes: int) -> LoopRV:
    """Let `block`, which stores rows, find a few rows of a transposed `matrix` turned back.

    Returns:
        The loop over vectors of rows.
    """
    store = sch.get_sblock(block)
    turned = sch.cache_read(store, _place(sch, store, matrix), "global")
    sch.transform_layout(turned, ("write", 0), swap)
    rows, _ = sch.split(sch.get_loops(store)[-2], [None, lanes])
    sch.compute_at(turned, rows)
    vectorize_last(sch, block, lanes)
    column = sch.get_loops(turned)[-2]
    _, column = sch.split(column, [None, lanes])
    sch.tensorize(column, _turned(lanes))
    return rows


def whole_blocks(width: int, lanes: int, paired: bool) -> bool:
    """Whether rows of so many columns are turned without a rest."""
    return width % (2 * lanes if paired else lanes) == 0


def turns_llvm(lanes: int) -> str:
    """The function ``deft_turn_<lanes>(o, stride_o, x, stride_x)``; strides in bytes.

    So many rows of as many elements of 32 bits from x, columns to o.
    """
    numbers = range(lanes)
    vector = f"<{lanes} x i32>"
    body = ["%x0 = add i64 0, 0", "%t0 = add i64 0, 0"]
    for n in numbers[1:]:
        body += [f"%x{n} = add i64 %x{n - 1}, %stride_x", f"%t{n} = add i64 %t{n - 1}, %stride_o"]
    for n in numbers:
        body += [
            f"%p{n} = getelementptr i8, ptr %x, i64 %x{n}",
            f"%v0_{n} = load {vector}, ptr %p{n}, align 2",
        ]
    body += exchanges(lanes)
    last = (lanes - 1).bit_length()
    for n in numbers:
        body += [
            f"%o{n} = getelementptr i8, ptr %o, i64 %t{n}",
            f"store {vector} %v{last}_{n}, ptr %o{n}, align 2",
        ]
    lines = "\n  ".join([*body, "ret i32 0"])
    parameters = "ptr %o, i64 %stride_o, ptr %x, i64 %stride_x"
    return f"\ndefine i32 @deft_turn_{lanes}({parameters}) alwaysinline {{\n  {lines}\n}}\n"


def exchanges(lanes: int) -> Iterator[str]:
    """LLVM that transposes ``%v0_0`` to ``%v0_<lanes - 1>``, vectors of as many 32-bit elements.

    Blocks of 1, 2, 4 and so on lanes are exchanged between vectors that many apart; the result of
    the last step s is ``%v<s>_<n>``.
    """
    apart, step = 1, 0
    while apart < lanes:
        low = (lane if not lane & apart else lanes + lane - apart for lane in range(lanes))
        high = (lane + apart if not lane & apart else lanes + lane for lane in range(lanes))
        masks = (_lanes(low), _lanes(high))
        for n in (n for n in range(lanes) if not n & apart):
            vectors = (f"<{lanes} x i32> %v{step}_{m}" for m in (n, n + apart))
            two = ", ".join(vectors)
            for m, mask in zip((n, n + apart), masks, strict=True):
                yield f"%v{step + 1}_{m} = shufflevector {two}, <{lanes} x i32> <{mask}>"
        apart, step = 2 * apart, step + 1


def _lanes(lanes: Iterable[int]) -> str:
    return ", ".join(f"i32 {lane}" for lane in lanes)


def _place(sch: Schedule, block: SBlockRV, matrix: str) -> int:
    """Of a buffer among those that the block reads."""
    names = [region.source.name for region in sch.get(block).reads]
    return names.index(matrix)


@cache
def _turned(lanes: int) -> str:
    """Intrinsic: ``lanes`` rows of as many float32, transposed."""

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (lanes, lanes), "float32", offset_factor=1)
        B = T.match_buffer(b, (lanes, lanes), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:lanes, 0:lanes])
            T.writes(B[0:lanes, 0:lanes])
            for i, j in T.grid(lanes, lanes):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vj, vi] = A[vi, vj]

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        stride_a, stride_b = T.int32(), T.int32()
        A = T.match_buffer(a, (lanes, lanes), "float32", offset_factor=1, strides=[stride_a, 1])
        B = T.match_buffer(b, (lanes, lanes), "float32", offset_factor=1, strides=[stride_b, 1])
        with T.sblock("root"):
            T.reads(A[0:lanes, 0:lanes])
            T.writes(B[0:lanes, 0:lanes])
            T.evaluate(
                _call(
                    lanes, T.address_of(B[0, 0]), stride_b * 4, T.address_of(A[0, 0]), stride_a * 4
                )
            )

    return register(f"deft_turned_{lanes}", description, implementation)


@cache
def _turned_pairs(lanes: int) -> str:
    """Intrinsic: ``lanes`` rows of as many pairs of 16 bits, transposed."""

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (lanes, 2 * lanes), "uint16", offset_factor=1)
        B = T.match_buffer(b, (lanes, lanes, 2), "uint16", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:lanes, 0 : 2 * lanes])
            T.writes(B[0:lanes, 0:lanes, 0:2])
            for i, j in T.grid(lanes, 2 * lanes):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vj // 2, vi, vj % 2] = A[vi, vj]

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        stride_a, stride_b = T.int32(), T.int32()
        A = T.match_buffer(a, (lanes, 2 * lanes), "uint16", offset_factor=1, strides=[stride_a, 1])
        B = T.match_buffer(
            b, (lanes, lanes, 2), "uint16", offset_factor=1, strides=[stride_b, 2, 1]
        )
        with T.sblock("root"):
            T.reads(A[0:lanes, 0 : 2 * lanes])
            T.writes(B[0:lanes, 0:lanes, 0:2])
            T.evaluate(
                _call(
                    lanes,
                    T.address_of(B[0, 0, 0]),
                    stride_b * 2,
                    T.address_of(A[0, 0]),
                    stride_a * 2,
                )
            )

    return register(f"deft_turned_pairs_{lanes}", description, implementation)


def _call(lanes: int, to: Any, to_bytes: Any, of: Any, of_bytes: Any) -> Any:
    strides = (T.Cast("int64", to_bytes), T.Cast("int64", of_bytes))
    return T.call_extern("int32", f"deft_turn_{lanes}", to, strides[0], of, strides[1])

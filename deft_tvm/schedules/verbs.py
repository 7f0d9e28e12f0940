"""Verbs that several schedules share, each a few primitives with one purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule, TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV


def power_of_two_in(width: int, most: int) -> int:
    """The largest power of two that divides `width`, at most `most`."""
    return min(width & -width, most)


def divisors(extent: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """The candidates that divide `extent`: a split by them leaves no tail."""
    return tuple(c for c in candidates if extent % c == 0)


def nearest(candidates: Sequence[int], wanted: int) -> int:
    """The largest candidate not above `wanted`, else the smallest."""
    return max((c for c in candidates if c <= wanted), default=min(candidates))


def vectorize_last(sch: Schedule, block: str, lanes: int) -> LoopRV:
    """Run the innermost loop of `block` in vectors of `lanes`; returns the loop over these."""
    loop = sch.get_loops(sch.get_sblock(block))[-1]
    outer, inner = sch.split(loop, [None, lanes])
    sch.vectorize(inner)
    return outer


def vectorize_over(sch: Schedule, block: str, axis: int, lanes: int) -> LoopRV:
    """Make one of the last two loops of `block` innermost, in vectors of `lanes`.

    for i, j: B[j, i] = f(i, j)   →   for j, i/lanes: B[j, i : i + lanes] = f(…)

    Returns:
        The loop over vectors.
    """
    loops = sch.get_loops(sch.get_sblock(block))[-2:]
    outer, inner = sch.split(loops[axis], [None, lanes])
    sch.reorder(loops[1 - axis], outer, inner)
    sch.vectorize(inner)
    return outer


def unroll_all(sch: Schedule, loops: Sequence[LoopRV]) -> None:
    for loop in loops:
        sch.unroll(loop)


def store_tile(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Write a register tile back in whole vectors; its two loops are unrolled."""
    outer, inner = sch.get_loops(block)[-2:]
    across, vector = sch.split(inner, [None, lanes])
    sch.vectorize(vector)
    unroll_all(sch, (outer, across))


def spread(
    sch: Schedule, block: str, nest: Sequence[LoopRV], parts: Sequence[Any]
) -> Sequence[LoopRV]:
    """Deal the steps of `block` out evenly over a nest of loops that follows it.

    for j, n: B[j, n]; for x, y: C[x, y]   →   for x, y: { a few of B; C[x, y] }

    Args:
        sch: the schedule.
        block: what to deal out, under two loops.
        nest: perfectly nested loops.
        parts: how many times each goes round; the steps need not divide by them.

    Returns:
        The nest, whose innermost loop now runs both.
    """
    steps = sch.fuse(*sch.get_loops(sch.get_sblock(block))[-2:])
    *outer, _ = sch.split(steps, [*parts, None])
    sch.merge(outer[-1], nest[-1])
    loops = sch.get_loops(sch.get_sblock(block))
    return loops[-1 - len(parts) : -1]


def import_llvm(sch: Schedule, block: str, source: str) -> None:
    """Define the LLVM functions of `source` in the module, for `block` and all under it to call."""
    sch.annotate(sch.get_loops(sch.get_sblock(block))[0], "pragma_import_llvm", source)


def register(name: str, description: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    """Make a tensor intrinsic known to TVM, replacing one that was there; returns its name."""
    TensorIntrin.register(name, description, implementation, override=True)
    return name


def swap(i: Any, j: Any) -> tuple[Any, Any]:
    """The layout map of a transpose."""
    return j, i

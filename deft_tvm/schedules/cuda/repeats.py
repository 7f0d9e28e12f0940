"""Loops whose iterations several threads do alike.

TensorIR binds a loop to a thread axis only where each thread has an iteration of its own. Where all
lanes of four keep a row's statistics, four do the same; a schedule annotates that loop, and the
pass here binds it: along ``threadIdx.x`` neighbours do the same iteration, ``i`` those from
``i · repeats`` on; along ``threadIdx.y`` warps that are as far apart as there are iterations, ``i``
and those after whole rounds.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import Var
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from deft_tvm.schedules.cuda.statements import substitute

REPEATS = "deft_tvm.repeats"
"""Annotation of a loop: threads an iteration, negative where only the first of them does it."""
AXIS = "deft_tvm.repeats_axis"


def repeat(sch: Schedule, loop: LoopRV, axis: str, repeats: int, *, once: bool = False) -> None:
    """Let `repeats` threads along ``threadIdx.x`` or ``.y`` do each iteration, or one of them."""
    sch.annotate(loop, REPEATS, -repeats if once else repeats)
    sch.annotate(loop, AXIS, axis)


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.RepeatIterations")
def repeat_iterations(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Bind the loops annotated by `repeat`."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, _bound)], order="post"))


def _bound(loop: tirx.For) -> tirx.Stmt:
    if REPEATS not in loop.annotations:
        return loop
    repeats, axis = int(loop.annotations[REPEATS]), str(loop.annotations[AXIS])
    once, repeats = repeats < 0, abs(repeats)
    thread = Var(f"{loop.loop_var.name}_thread", "int32")
    iteration, copy = tirx.floordiv(thread, repeats), tirx.floormod(thread, repeats)
    if axis == "threadIdx.y":
        iteration, copy = tirx.floormod(thread, loop.extent), tirx.floordiv(thread, loop.extent)
    body = substitute(loop.body, loop.loop_var, iteration)
    if once and repeats > 1:
        body = tirx.IfThenElse(copy == 0, body, None)
    binding = tirx.IterVar(None, Var("", "int32"), tirx.IterVar.ThreadIndex, axis)
    extent = tirx.IntImm("int32", int(loop.extent) * repeats)
    return tirx.For(
        thread, tirx.IntImm("int32", 0), extent, tirx.ForKind.THREAD_BINDING, body, binding, {}
    )

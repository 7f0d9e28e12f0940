"""What is asked once a row: where it goes, and whether it is one.

Each lane writes many elements of a row. TVM would look up the row's destination, and branch on it,
for each of them; nvcc does not put such branches together. A schedule annotates the loop over a
lane's rows, and the pass here moves what depends on the row alone out of the loops inside.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import Var
from tvm.s_tir import SBlockRealize

from deft_tvm.schedules.cuda.statements import loop_like

ROWS = "deft_tvm.rows"
"""Annotation of the loop over a lane's rows."""


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.AskOnceARow")
def ask_once_a_row(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Move branches out of the loops inside those annotated with `ROWS`."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, _asked)], order="post"))


def _asked(loop: tirx.For) -> tirx.Stmt:
    if ROWS not in loop.annotations:
        return loop
    inside, body = [], loop.body
    while isinstance(body, (tirx.For, SBlockRealize)):
        if isinstance(body, tirx.For):
            inside.append(body)
            body = body.body
        else:
            body = body.block.body
    return tirx.For(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        _moved(body, inside),
        loop.thread_binding,
        {},
    )


def _moved(body: tirx.Stmt, loops: list[tirx.For]) -> tirx.Stmt:
    """`body` in `loops`, with all outside that does not depend on them."""
    if isinstance(body, tirx.SeqStmt):
        *binds, last = body.seq
        if all(isinstance(b, tirx.Bind) and not _depends(b.value, loops) for b in binds):
            return tirx.SeqStmt([*binds, _moved(last, loops)])
    if isinstance(body, tirx.IfThenElse) and not _depends(body.condition, loops):
        other = None if body.else_case is None else _moved(body.else_case, loops)
        return tirx.IfThenElse(body.condition, _moved(body.then_case, loops), other)
    return _nest(body, loops)


def _depends(value: Any, loops: list[tirx.For]) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, [(Var, found.append)])
    return any(var.same_as(loop.loop_var) for var in found for loop in loops)


def _nest(body: tirx.Stmt, loops: list[tirx.For]) -> tirx.Stmt:
    for loop in reversed(loops):
        body = loop_like(loop, body)
    return body

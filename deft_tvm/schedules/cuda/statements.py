"""Small rewritings that several passes are made of."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Var


def substitute(node: Any, var: Any, value: Any) -> Any:
    """`node` with `value` in the place of a variable."""
    return tvm_ffi.structural_map(node, [(Var, lambda v: value if v.same_as(var) else v)])


def loop_like(loop: tirx.For, body: tirx.Stmt, kind: int | None = None) -> tirx.For:
    """A loop of the same extent over `body`, with an index of its own.

    Args:
        loop: whose index `body` has.
        body: of the new one.
        kind: by default that of `loop`.
    """
    index = Var(loop.loop_var.name, "int32")
    moved = substitute(body, loop.loop_var, index)
    return tirx.For(index, loop.min, loop.extent, loop.kind if kind is None else kind, moved)

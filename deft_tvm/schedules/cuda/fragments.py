"""Buffers that are spread over the registers of a block's threads.

Schedules see such a buffer whole, ``[warp, ..., lane, register]``, in the scope ``local.fragment``.
A thread keeps only its own share: the pass here, run once intrinsics stand in the code, sets the
warp and lane axes to length one. TVM's own ``warp`` scope is not used: its lowering handles a
kernel's first such buffer only and leaves the others 32 times too large.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import TensorLoad, Var
from tvm.tirx.buffer import is_buffer_var

FRAGMENT = "local.fragment"
"""Scope of ``[warp, ..., lane, register]``: every thread has elements of its own."""

ROWS = "local.rows"
"""Scope of ``[warp, register]``: all lanes of a warp have the same."""

THREAD_AXES = {FRAGMENT: (0, -2), ROWS: (0,)}


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.KeepOwnShare")
def keep_own_share(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Cut every buffer that is spread over threads down to the share of one thread."""
    shares: dict[Any, Any] = {}

    def share_of(var: Any) -> Any:
        if not _thread_axes(var):
            return var
        if var not in shares:
            shape = _with_units(var, var.ty.shape, 1)
            shares[var] = tirx.decl_buffer(shape, var.ty.dtype, var.name, scope="local")
        return shares[var]

    body = tvm_ffi.structural_map(
        func.body, [(tirx.BufferStore, _own_store), (TensorLoad, _own_load)], order="post"
    )
    return func.with_body(tvm_ffi.structural_map(body, [(Var, share_of)], order="post"))


def _own_store(store: Any) -> Any:
    if not _thread_axes(store.buffer):
        return store
    return tirx.BufferStore(store.buffer, store.value, _with_units(store.buffer, store.indices, 0))


def _own_load(load: Any) -> Any:
    if not _thread_axes(load.source):
        return load
    return tirx.BufferLoad(load.source, _with_units(load.source, load.indices, 0))


def _thread_axes(var: Any) -> tuple[int, ...]:
    """Which axes of a buffer name a thread; none for what is no such buffer."""
    return THREAD_AXES.get(var.scope(), ()) if is_buffer_var(var) else ()


def _with_units(buffer: Any, axes: Any, unit: int) -> list[Any]:
    """`axes`, extents or indices of `buffer`, with `unit` for those that name a thread."""
    changed = list(axes)
    for axis in _thread_axes(buffer):
        changed[axis] = tirx.IntImm("int32", unit)
    return changed

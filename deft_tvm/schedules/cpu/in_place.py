"""Stages that may write over what they read: fewer bytes in the caches, and no copy back.

TVM accepts no block that reads and writes one buffer outside a reduction, so that a computation
has one for each stage. Where a stage makes an element of the one buffer from the same element of
the other, and nothing reads that again (`kernels.stages.SUCCESSORS`), one buffer does.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, tirx, transform
from tvm.ir import TensorLoad, Var

from deft_tvm.kernels.stages import SUCCESSORS


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.WriteInPlace")
def write_in_place(
    func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Let successors take the place of what they are made of; runs on flat buffers."""
    places = _places(func.body)
    if not places:
        return func

    def forget(allocation: tirx.AllocBuffer) -> Any:
        return tirx.Evaluate(0) if allocation.buffer in places else allocation

    def move(var: Any) -> Any:
        return places.get(var, var)

    def drop(store: tirx.BufferStore) -> Any:
        value = store.value
        same = isinstance(value, TensorLoad) and value.source.same_as(store.buffer)
        if same and tvm_ffi.structural_equal(list(value.indices), list(store.indices)):
            return tirx.Evaluate(0)
        return store

    body = tvm_ffi.structural_map(func.body, [(tirx.AllocBuffer, forget)], order="post")
    body = tvm_ffi.structural_map(body, [(Var, move)], order="post")
    return func.with_body(tvm_ffi.structural_map(body, [(tirx.BufferStore, drop)], order="post"))


def _places(body: tirx.Stmt) -> dict[Any, Any]:
    """For each buffer that goes, the one in whose place it comes."""
    by_name: dict[str, list[Any]] = {}

    def look(allocation: tirx.AllocBuffer) -> None:
        by_name.setdefault(allocation.buffer.name, []).append(allocation.buffer)

    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, look)])
    places: dict[Any, Any] = {}
    for names in SUCCESSORS.items():
        found = [by_name.get(name, []) for name in names]
        if all(len(buffers) == 1 for buffers in found):
            new, old = found[0][0], found[1][0]
            if _alike(new, old) and _made_of(body, new, old):
                places[new] = places.get(old, old)
    return places


def _alike(new: Any, old: Any) -> bool:
    same = [int(extent) for extent in new.ty.shape] == [int(extent) for extent in old.ty.shape]
    return same and str(new.ty.dtype) == str(old.ty.dtype) and new.scope() == old.scope()


def _made_of(body: tirx.Stmt, new: Any, old: Any) -> bool:
    """Whether every element is made of none but the same element of `old`."""
    found = [True]

    def look(store: tirx.BufferStore) -> None:
        if not store.buffer.same_as(new):
            return

        def read(load: Any) -> None:
            if load.source.same_as(old):
                found[0] &= tvm_ffi.structural_equal(list(load.indices), list(store.indices))

        tvm_ffi.structural_walk(store.value, [(TensorLoad, read)])

    tvm_ffi.structural_walk(body, [(tirx.BufferStore, look)])
    return found[0]

"""Stages that may write over what they read: fewer bytes in the caches, and no copy back.

TVM accepts no block that reads and writes one buffer outside a reduction, so that a computation
has one for each stage. Where a stage makes an element of the one buffer from the same element of
the other, and nothing reads that again (`kernels.stages.SUCCESSORS`), one buffer does. It may be
part of the other, as one head's output is of all heads': the same element lies as far from there as
what is copied back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tvm_ffi
from tvm import IRModule, tirx, transform
from tvm.ir import TensorLoad
from tvm.sym import Analyzer

from deft_tvm.kernels.stages import SUCCESSORS


class _Place(NamedTuple):
    """Where a buffer's elements come: in another, so many elements further on."""

    buffer: Any
    offset: Any


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

    def load(element: TensorLoad) -> Any:
        place = places.get(element.source)
        if place is None:
            return element
        return tirx.BufferLoad(place.buffer, [element.indices[0] + place.offset])

    def store(element: tirx.BufferStore) -> Any:
        buffer, (index,), value = element.buffer, element.indices, element.value
        if (place := places.get(buffer)) is not None:
            buffer, index = place.buffer, index + place.offset
        if _is_of(value, buffer) and _same(value.indices[0], index):
            return tirx.Evaluate(0)
        return tirx.BufferStore(buffer, value, [index])

    changes = [(tirx.AllocBuffer, forget), (TensorLoad, load), (tirx.BufferStore, store)]
    return func.with_body(tvm_ffi.structural_map(func.body, changes, order="post"))


def _places(body: tirx.Stmt) -> dict[Any, _Place]:
    """For each buffer that goes, the one in whose place it comes."""
    by_name: dict[str, list[Any]] = {}

    def look(allocation: tirx.AllocBuffer) -> None:
        by_name.setdefault(allocation.buffer.name, []).append(allocation.buffer)

    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, look)])
    places: dict[Any, _Place] = {}
    for names in SUCCESSORS:
        found = [by_name.get(name, []) for name in names]
        if any(len(buffers) != 1 for buffers in found):
            continue
        new, old = found[0][0], found[1][0]
        offset = _offset(body, new, old)
        if offset is not None and _made_of(body, new, old, offset):
            before = places.get(old, _Place(old, 0))
            places[new] = _Place(before.buffer, before.offset + offset)
    return places


def _offset(body: tirx.Stmt, new: Any, old: Any) -> Any | None:
    """How far from an element of `new` the same element of `old` lies; None if none is the same."""
    if str(new.ty.dtype) != str(old.ty.dtype) or new.scope() != old.scope():
        return None
    if [int(extent) for extent in new.ty.shape] == [int(extent) for extent in old.ty.shape]:
        return 0
    offsets = []

    def look(store: tirx.BufferStore) -> None:
        if store.buffer.same_as(old) and _is_of(store.value, new):
            offsets.append(Analyzer().simplify(store.indices[0] - store.value.indices[0]))

    tvm_ffi.structural_walk(body, [(tirx.BufferStore, look)])
    return offsets[0] if len(offsets) == 1 else None


def _made_of(body: tirx.Stmt, new: Any, old: Any, offset: Any) -> bool:
    """Whether every element is made of none but the same element of `old`."""
    found = [True]

    def look(store: tirx.BufferStore) -> None:
        if not store.buffer.same_as(new):
            return

        def read(load: TensorLoad) -> None:
            if load.source.same_as(old):
                found[0] &= _same(load.indices[0], store.indices[0] + offset)

        tvm_ffi.structural_walk(store.value, [(TensorLoad, read)])

    tvm_ffi.structural_walk(body, [(tirx.BufferStore, look)])
    return found[0]


def _is_of(value: Any, buffer: Any) -> bool:
    """Whether a value is an element of a buffer, as it is."""
    return isinstance(value, TensorLoad) and value.source.same_as(buffer)


def _same(one: Any, other: Any) -> bool:
    return Analyzer().can_prove_equal(one, other)

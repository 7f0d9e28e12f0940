"""Buffers that are spread over the registers of a block's threads.

Schedules see such a buffer whole and only say, by its scope, who has which element. The pass here,
run once all loops and intrinsics stand, leaves each thread the part that it has. A choice of warps
so stays in the loops alone, where a search can change it. TVM's own ``warp`` scope is not used: its
lowering handles a kernel's first such buffer only and leaves the others 32 times too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx, transform
from tvm.ir import Range, TensorLoad, TensorRegion, Var
from tvm.tirx.buffer import is_buffer_var

from deft_tvm.schedules.cuda.threads import LANES

DEALT = "local.dealt"
"""``[row, column]``: rows dealt out to warps and columns to lanes, as to players of cards."""

FOUR = 4
"""Neighbouring float32 elements, which are loaded and stored at a time."""

DEALT_FOURS = "local.dealt_fours"
"""The same with `FOUR` columns to each lane."""

DEALT_ROWS = "local.dealt_rows"
"""``[row]``: rows dealt out to warps, and all lanes of a warp have the same."""

DEALT_THREADS = "local.dealt_threads"
"""``[element]``: dealt out to all threads."""

FRAGMENT = "local.fragment"
"""``[row, share, column, lane, register]``: all but column and register name a thread."""

QUAD_ROWS = "local.quad_rows"
"""``[..., row]``: of 16 rows a warp has, each lane keeps the two whose elements it holds in
fragments, 8 apart, as do the other lanes of its four. Axes before name a warp."""

Axes = list[tuple[int, Callable[[Any], Any]]]


def _divided(shape: list[int], by: list[int]) -> Axes:
    def part(divisor: int) -> Callable[[Any], Any]:
        return lambda index: tirx.floordiv(index, divisor)

    return [(-(-extent // d), part(d)) for extent, d in zip(shape, by, strict=True)]


def _fours(shape: list[int], warps: int) -> Axes:
    round_of_all = FOUR * LANES
    columns = -(-shape[1] // round_of_all) * FOUR

    def place(index: Any) -> Any:
        return tirx.floordiv(index, round_of_all) * FOUR + tirx.floormod(index, FOUR)

    return [*_divided(shape[:1], [warps]), (columns, place)]


def _of_quads(shape: list[int]) -> Axes:
    first: Axes = [(1, lambda _: tirx.IntImm("int32", 0))] * (len(shape) - 1)
    return [*first, (2, lambda index: tirx.floordiv(tirx.floormod(index, 16), 8))]


PARTS: dict[str, Callable[[list[int], int], Axes]] = {
    DEALT: lambda shape, warps: _divided(shape, [warps, LANES]),
    DEALT_FOURS: _fours,
    DEALT_ROWS: lambda shape, warps: _divided(shape, [warps]),
    DEALT_THREADS: lambda shape, warps: _divided(shape, [warps * LANES]),
    FRAGMENT: lambda shape, warps: _divided(
        shape, [*shape[:2], *[1] * (len(shape) - 4), shape[-2], 1]
    ),
    QUAD_ROWS: lambda shape, warps: _of_quads(shape),
}
"""Axis by axis the extent of an owner's part, and an index's place in it."""


def keep_own_share(*scopes: str) -> transform.Pass:
    """The pass that cuts buffers of `scopes` down to the part of one thread.

    Dealt buffers come first of all, since TVM gives a reduction's result to all threads only where
    the scope is plainly ``local``; fragments once no intrinsic asks for a whole one.
    """

    @tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.KeepOwnShare")
    def cut(func: tirx.PrimFunc, _module: Any, _context: transform.PassContext) -> tirx.PrimFunc:
        return func.with_body(_Shares(scopes, _warps(func.body)).cut(func.body))

    return cut


class _Shares:
    """The rewriting of one kernel."""

    def __init__(self, scopes: tuple[str, ...], warps: int) -> None:
        self.scopes, self.warps = scopes, warps
        self.parts: dict[Any, Any] = {}

    def cut(self, body: tirx.Stmt) -> tirx.Stmt:
        uses = [
            (tirx.BufferStore, self._store),
            (TensorLoad, self._load),
            (TensorRegion, self._region),
        ]
        body = tvm_ffi.structural_map(body, uses, order="post")
        return tvm_ffi.structural_map(body, [(Var, self._part)], order="post")

    def _store(self, store: Any) -> Any:
        if not self._is_spread(store.buffer):
            return store
        return tirx.BufferStore(store.buffer, store.value, self._own(store.buffer, store.indices))

    def _load(self, load: Any) -> Any:
        if not self._is_spread(load.source):
            return load
        return tirx.BufferLoad(load.source, self._own(load.source, load.indices))

    def _region(self, region: Any) -> Any:
        if not self._is_spread(region.source):
            return region
        whole = self._part(region.source).ty.shape
        first = self._own(region.source, [axis.min for axis in region.region])
        ranges = [
            Range.from_min_extent(index, 1) if int(axis.extent) == 1 else Range(0, extent)
            for index, axis, extent in zip(first, region.region, whole, strict=True)
        ]
        return tirx.BufferRegion(region.source, ranges)

    def _part(self, var: Any) -> Any:
        """The declaration of one thread's part of a spread buffer; any other variable as it is."""
        if not self._is_spread(var):
            return var
        if var not in self.parts:
            shape = [extent for extent, _ in self._axes(var)]
            self.parts[var] = tirx.decl_buffer(shape, var.ty.dtype, var.name, scope="local")
        return self.parts[var]

    def _own(self, buffer: Any, indices: Any) -> list[Any]:
        axes = self._axes(buffer)
        return [place(index) for (_, place), index in zip(axes, indices, strict=True)]

    def _axes(self, buffer: Any) -> Axes:
        shape = [int(extent) for extent in buffer.ty.shape]
        return PARTS[buffer.scope()](shape, self.warps)

    def _is_spread(self, var: Any) -> bool:
        return bool(is_buffer_var(var)) and var.scope() in self.scopes


def _warps(body: tirx.Stmt) -> int:
    """How many warps the kernel's blocks have."""
    extents = [1]

    def look(loop: tirx.For) -> None:
        binding = loop.thread_binding
        if binding is not None and binding.thread_tag == "threadIdx.y":
            extents.append(int(loop.extent))

    tvm_ffi.structural_walk(body, [(tirx.For, look)])
    return max(extents)

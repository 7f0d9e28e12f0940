"""A plan as two tensors: what kernels read, in one piece, and how it is divided.

Two, so that a GPU gets one transfer, and that a compiled program sees the one size of a plan change
and not those of ten arrays, of which each being 0, 1 or more would compile it again. The layout
stays on the CPU, where reading it waits for nothing.
"""

from __future__ import annotations

import threading
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
import tvm_ffi
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.plan import Plan

RECENT = 8
"""Plans that a thread keeps unpacked: those that the layers of a model alternate between."""

_COLUMNS = 7
_HEADER = 8
_SCALARS = 3
_ARRAYS = 6


class Unpacked(NamedTuple):
    """The arrays of `deft_tvm.plan.Plan` on the device, as views.

    They are tensors of the kernels' own kind, which kernels take faster than torch's.

    Attributes:
        reads: header, page_indices, row_order, row_positions, and runs.
        dests: where each row of each item goes.
        items: of each tile class; None if it has none.
        merges: merge_indptr and merge_rows.
        rows: how many the plan has.
        merged: how many rows stage 2 has.
        partials: slots that the workspace must hold.
        needed: pages, or tokens, that every cache buffer must have.
        paged: whether it has pages.
        device: where the arrays are.
    """

    reads: tuple[tvm_ffi.Tensor, ...]
    dests: tvm_ffi.Tensor
    items: tuple[tvm_ffi.Tensor | None, ...]
    merges: tuple[tvm_ffi.Tensor, tvm_ffi.Tensor]
    rows: int
    merged: int
    partials: int
    needed: int
    paged: bool
    device: torch.device


def pack(plan: Plan, paged: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The operators' ``plan``, int32[N] on `device`, and ``layout``, int64 on the CPU.

    The layout is whether there are pages, the pages (or tokens) needed, the partial slots; then
    the lengths of page_indices, row_order, row_positions, runs, dests and merge_rows; then the
    items of each tile class.
    """
    rows = (plan.row_order, plan.row_positions)
    arrays = (plan.page_indices, *rows, plan.runs, plan.dests, plan.merge_rows)
    packed = (plan.header, *arrays, plan.merge_indptr, plan.items)
    counts = {tile: end - begin for tile, begin, end in plan.launches}
    needed = plan.max_page + 1 if paged else plan.forest.num_tokens
    layout = [paged, needed, plan.num_partials, *map(len, arrays)]
    layout += [counts.get(tile, 0) for tile in range(len(plan.tiles))]
    if plan.whole is None:
        whole = torch.from_numpy(np.concatenate([array.reshape(-1) for array in packed]))
    else:
        whole = torch.from_numpy(plan.whole)
    return whole.to(device), torch.from_numpy(np.array(layout, np.int64))


class Packed(NamedTuple):
    """A plan as `pack` makes it, and the views of it."""

    plan: Tensor
    layout: Tensor
    unpacked: Unpacked

    @classmethod
    def of(cls, plan: Plan, paged: bool, device: torch.device) -> Packed:
        whole, layout = pack(plan, paged, device)
        return cls(whole, layout, _divide(whole, *layout.tolist()))

    def follow(self, old: Plan, plan: Plan) -> Packed | None:
        """The same of `plan`, where only runs and items differ from those of `old`, packed here."""
        same = plan.dests is old.dests and plan.page_indices is old.page_indices
        if not same or plan.header is not old.header or self.plan.device.type != "cpu":
            return None
        whole = self.plan.numpy().copy()
        begin = sum(map(len, (plan.header, plan.page_indices, plan.row_order, plan.row_positions)))
        runs = whole[begin : begin + plan.runs.size].reshape(-1, _COLUMNS)
        table = whole[len(whole) - plan.items.size :].reshape(-1, _COLUMNS)
        runs[:], table[:] = plan.runs, plan.items
        items = list(self.unpacked.items)
        for tile, first, end in plan.launches:
            items[tile] = tvm_ffi.from_dlpack(table[first:end])
        reads = (*self.unpacked.reads[:-1], tvm_ffi.from_dlpack(runs))
        unpacked = self.unpacked._replace(reads=reads, items=tuple(items))
        return Packed(torch.from_numpy(whole), self.layout, unpacked)


def unpack(plan: Tensor, layout: Tensor) -> Unpacked:
    """The views of a packed plan; those of recent plans are kept.

    Raises:
        InputError: `plan` and `layout` are not what `pack` makes.
    """
    if layout.dtype is not torch.int64 or layout.dim() != 1:
        raise InputError(f"layout is {_what(layout)}; expected int64[N]")
    # A kept view keeps its storage, so no other plan can come to lie at the same address.
    key = (plan.data_ptr(), *layout.tolist())
    found = _recent.plans.get(key)
    if found is None:
        _check(plan, key[1:])
        while len(_recent.plans) >= RECENT:
            del _recent.plans[next(iter(_recent.plans))]
        found = _recent.plans[key] = _divide(plan, *key[1:])
    return found


class _Recent(threading.local):
    def __init__(self) -> None:
        self.plans: dict[tuple[int, ...], Unpacked] = {}


_recent = _Recent()


def _divide(plan: Tensor, paged: int, needed: int, partials: int, *lengths: int) -> Unpacked:
    # Views of numpy's arrays are made in a third of the time of torch's.
    whole = plan.numpy() if plan.device.type == "cpu" else plan
    ends = [*accumulate(_sizes(lengths), initial=0)]
    parts = [whole[begin:end] for begin, end in pairwise(ends)]
    runs, items = parts[4].reshape(-1, _COLUMNS), parts[8].reshape(-1, _COLUMNS)
    bounds = pairwise(accumulate(lengths[_ARRAYS:], initial=0))
    header, page_indices, row_order, row_positions = map(tvm_ffi.from_dlpack, parts[:4])
    dests, merge_rows, merge_indptr = map(tvm_ffi.from_dlpack, parts[5:8])
    return Unpacked(
        reads=(header, page_indices, row_order, row_positions, tvm_ffi.from_dlpack(runs)),
        dests=dests,
        items=tuple(
            tvm_ffi.from_dlpack(items[begin:end]) if end > begin else None for begin, end in bounds
        ),
        merges=(merge_indptr, merge_rows),
        rows=lengths[1],
        merged=lengths[5],
        partials=partials,
        needed=needed,
        paged=bool(paged),
        device=plan.device,
    )


def _sizes(lengths: tuple[int, ...]) -> list[int]:
    """Elements of each part of a plan, in order."""
    pages, rows, positions, runs, dests, merged, *items = lengths
    sizes = [_HEADER, pages, rows, positions, runs * _COLUMNS, dests, merged, merged + 1]
    return [*sizes, sum(items) * _COLUMNS]


def _check(plan: Tensor, layout: tuple[int, ...]) -> None:
    """Refuse a plan that cannot be divided as `layout` says."""
    if len(layout) <= _SCALARS + _ARRAYS or min(layout) < 0:
        raise InputError(
            f"layout is {list(layout)}; expected {_SCALARS + _ARRAYS + 1} or more numbers, "
            f"none below zero"
        )
    size = sum(_sizes(layout[_SCALARS:]))
    if plan.dtype is not torch.int32 or plan.shape != (size,):
        raise InputError(f"plan is {_what(plan)}; expected int32[{size}], as layout says")
    if not plan.is_contiguous():
        raise InputError(f"plan has strides {plan.stride()}; expected it contiguous")


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

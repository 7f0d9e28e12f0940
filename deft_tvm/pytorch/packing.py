"""A plan as two tensors: what kernels read, in one piece, and how it is divided.

Two, so that a GPU gets one transfer, and that a compiled program sees the one size of a plan change
and not those of ten arrays, of which each being 0, 1 or more would compile it again. The layout
stays on the CPU, where reading it waits for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.plan import Plan
from deft_tvm.plan.layout import Int32, Laid

_COLUMNS = 7
_HEADER = 8
_SCALARS = 3
_ARRAYS = 6


def pack(plan: Plan, paged: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The operators' ``plan``, int32[N] on `device`, and ``layout``, int64 on the CPU.

    The layout is whether there are pages, the pages (or tokens) needed, the partial slots; then
    the lengths of page_indices, row_order, row_positions, runs, dests and merge_rows; then the
    items of each tile class.
    """
    whole, numbers = _numbers(plan, paged)
    return torch.from_numpy(whole).to(device), torch.from_numpy(np.array(numbers, np.int64))


def _numbers(plan: Plan, paged: bool) -> tuple[Int32, list[int]]:
    """The same in numpy; the layout as a list."""
    if not isinstance(plan.laid, Laid):
        return plan.laid.packed
    rows = (plan.row_order, plan.row_positions)
    arrays = (plan.page_indices, *rows, plan.runs, plan.dests, plan.merge_rows)
    packed = (plan.header, *arrays, plan.merge_indptr, plan.items)
    counts = {tile: end - begin for tile, begin, end in plan.launches}
    needed = plan.max_page + 1 if paged else plan.forest.num_tokens
    layout = [int(paged), needed, plan.num_partials, *map(len, arrays)]
    layout += [counts.get(tile, 0) for tile in range(len(plan.tiles))]
    return np.concatenate([array.reshape(-1) for array in packed]), layout


class Packed(NamedTuple):
    """A plan as kernels take it, and what of the layout is asked for in every call.

    Attributes:
        plan: see `pack`.
        layout: see `pack`.
        paged: whether there are pages.
        needed: pages, or tokens, that every cache buffer must have.
        partials: slots that the workspace must hold.
        rows: how many the plan has.
    """

    plan: Tensor
    layout: Tensor
    paged: bool
    needed: int
    partials: int
    rows: int

    @property
    def device(self) -> torch.device:
        return self.plan.device

    @classmethod
    def of(cls, plan: Plan, paged: bool, device: torch.device) -> Packed:
        whole, numbers = _numbers(plan, paged)
        layout = torch.from_numpy(np.array(numbers, np.int64))
        return cls.divided(torch.from_numpy(whole).to(device), layout, numbers)

    @classmethod
    def of_tensors(cls, plan: Tensor, layout: Tensor, num_tiles: int) -> Packed:
        """
        Raises:
            InputError: `plan` and `layout` are not what `pack` makes for so many tile classes.
        """
        if layout.dtype is not torch.int64 or layout.dim() != 1:
            raise InputError(f"layout is {_what(layout)}; expected int64[N]")
        if not (layout.is_cpu and layout.is_contiguous()):
            raise InputError(
                f"layout is on {layout.device} with strides {layout.stride()}; expected it "
                f"contiguous on the CPU"
            )
        numbers = layout.tolist()
        _check(plan, numbers, num_tiles)
        return cls.divided(plan, layout, numbers)

    @classmethod
    def divided(cls, plan: Tensor, layout: Tensor, numbers: list[int]) -> Packed:
        """As `layout` says, whose `numbers` are given."""
        paged, needed, partials, _, rows, *_ = numbers
        return cls(plan, layout, bool(paged), needed, partials, rows)


def _sizes(lengths: list[int]) -> list[int]:
    """Elements of each part of a plan, in order."""
    pages, rows, positions, runs, dests, merged, *items = lengths
    sizes = [_HEADER, pages, rows, positions, runs * _COLUMNS, dests, merged, merged + 1]
    return [*sizes, sum(items) * _COLUMNS]


def _check(plan: Tensor, layout: list[int], num_tiles: int) -> None:
    """Refuse a plan that cannot be divided as `layout` says."""
    wanted = _SCALARS + _ARRAYS + num_tiles
    if len(layout) != wanted or min(layout) < 0:
        raise InputError(f"layout is {layout}; expected {wanted} numbers, none below zero")
    size = sum(_sizes(layout[_SCALARS:]))
    if plan.dtype is not torch.int32 or plan.shape != (size,):
        raise InputError(f"plan is {_what(plan)}; expected int32[{size}], as layout says")
    if not plan.is_contiguous():
        raise InputError(f"plan has strides {plan.stride()}; expected it contiguous")


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

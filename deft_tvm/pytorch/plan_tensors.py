"""A plan as two tensors: what kernels read, in one buffer, and how it is divided.

Two, so that a GPU gets one transfer, and that a compiled program sees the one size of a plan change
and not those of ten arrays, of which each being 0, 1 or more would compile it again. The layout
stays on the CPU, where reading it waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.plan import Plan
from deft_tvm.plan.buffer import FIXED, in_one_buffer, part_sizes


class PlanTensors(NamedTuple):
    """A plan as kernels take it, and what of the layout is asked for in every call.

    Attributes:
        plan: int32[N] on the device; see `deft_tvm.plan.buffer`.
        layout: int64, how it is divided, on the CPU.
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
    def of(cls, plan: Plan, device: torch.device | None = None) -> PlanTensors:
        """`device`: where to copy it; None for a CPU, of which torch takes long to ask."""
        whole, size, numbers = in_one_buffer(plan)
        made = torch.frombuffer(whole, dtype=torch.int32, count=size)
        if device is not None:
            made = made.to(device)
        return cls._divided(made, torch.frombuffer(numbers, dtype=torch.int64), numbers)

    @classmethod
    def of_tensors(cls, plan: Tensor, layout: Tensor, num_tiles: int) -> PlanTensors:
        """
        Raises:
            InputError: `plan` and `layout` are not what `of` makes for so many tile classes.
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
        return cls._divided(plan, layout, numbers)

    @classmethod
    def _divided(cls, plan: Tensor, layout: Tensor, numbers: Sequence[int]) -> PlanTensors:
        """As `layout` says, whose `numbers` are given."""
        paged, needed, partials, _, rows = numbers[:5]
        return cls(plan, layout, bool(paged), needed, partials, rows)


def _check(plan: Tensor, layout: list[int], num_tiles: int) -> None:
    """Refuse a plan that cannot be divided as `layout` says."""
    wanted = FIXED + num_tiles
    if len(layout) != wanted or min(layout) < 0:
        raise InputError(f"layout is {layout}; expected {wanted} numbers, none below zero")
    size = sum(part_sizes(layout))
    if plan.dtype is not torch.int32 or plan.shape != (size,):
        raise InputError(f"plan is {_what(plan)}; expected int32[{size}], as layout says")
    if not plan.is_contiguous():
        raise InputError(f"plan has strides {plan.stride()}; expected it contiguous")


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

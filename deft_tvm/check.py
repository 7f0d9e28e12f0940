"""One step against the oracle: how far it is, and how far correct rounding may bring it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from deft_tvm.reference import Bound, Exact
from deft_tvm.workloads import Case

if TYPE_CHECKING:
    from deft_tvm.plan import Plan
    from deft_tvm.pytorch import TreeAttention


class Exactness(msgspec.Struct, frozen=True):
    """Largest absolute errors of a step, over all rows and heads, beside their bounds.

    A NaN, or a finite number in the place of an infinite one, is an infinite error.
    """

    out_error: float
    out_bound: float
    lse_error: float
    lse_bound: float

    @property
    def holds(self) -> bool:
        """Both errors are what rounding explains."""
        return self.out_error <= self.out_bound and self.lse_error <= self.lse_bound


def check(case: Case, attention: TreeAttention) -> Exactness:
    """Plan and run `case`, and compare with `reference.tree_attention`."""
    plan = attention.plan(case.forest, case.pages)
    return judge(case, plan, *attention.run(case.q, case.kv, sinks=case.sinks))


def judge(case: Case, plan: Plan, out: Tensor, lse: Tensor) -> Exactness:
    """What a run of `case` by `plan` has left, beside `reference.tree_attention`."""
    exact = case.reference()
    bound = bound_of(plan, exact, case.spec.dtype)
    return Exactness(
        largest_error(out, exact.out), bound.out, largest_error(lse, exact.lse), bound.lse
    )


def bound_of(plan: Plan, exact: Exact, dtype: str) -> Bound:
    """The widest bound of the tile classes that `plan` uses."""
    operands = {plan.tiles[tile].operand for tile, _, _ in plan.launches} or {"float32"}
    bounds = [exact.bound(operand, dtype) for operand in operands]
    return Bound(max(bound.out for bound in bounds), max(bound.lse for bound in bounds))


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Of all elements; infinite for a NaN, and for a finite number in the place of an infinite."""
    if not exact.numel():
        return 0.0
    same = found.double() == exact  # the infinite ones, whose difference is not a number
    error = (found.double() - exact).abs().masked_fill(same, 0.0)
    return float(error.nan_to_num(torch.inf).max())

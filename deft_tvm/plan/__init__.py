"""The plan of one step: which rows read which KV together, in the arrays that kernels read."""

from __future__ import annotations

from deft_tvm.plan.cost import CostModel
from deft_tvm.plan.layout import Plan
from deft_tvm.plan.planner import GROUPINGS, Recipe, make_plan, make_recipe
from deft_tvm.plan.traffic import Traffic, traffic

__all__ = [
    "GROUPINGS",
    "CostModel",
    "Plan",
    "Recipe",
    "Traffic",
    "make_plan",
    "make_recipe",
    "traffic",
]

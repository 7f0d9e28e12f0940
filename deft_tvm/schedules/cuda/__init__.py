"""Schedules for NVIDIA GPUs."""

from deft_tvm.schedules.cuda.merge import schedule_merge
from deft_tvm.schedules.cuda.scalar import rows_over_warps
from deft_tvm.schedules.cuda.tensor_cores import tensor_cores
from deft_tvm.schedules.rule import Rule

__all__ = ["RULES", "schedule_merge"]

RULES: tuple[Rule, ...] = (tensor_cores, rows_over_warps)

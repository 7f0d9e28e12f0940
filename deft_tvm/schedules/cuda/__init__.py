"""Schedules for NVIDIA GPUs."""

from deft_tvm.schedules.cuda.merge import merge_columns
from deft_tvm.schedules.cuda.scalar import rows_over_warps
from deft_tvm.schedules.cuda.tensor_cores import tensor_cores
from deft_tvm.schedules.rule import Rule

RULES: tuple[Rule, ...] = (merge_columns, tensor_cores, rows_over_warps)

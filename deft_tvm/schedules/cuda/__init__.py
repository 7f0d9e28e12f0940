"""Schedules for NVIDIA GPUs."""

from deft_tvm.schedules.cuda.scalar import scalar
from deft_tvm.schedules.rule import Rule

RULES: tuple[Rule, ...] = (scalar,)

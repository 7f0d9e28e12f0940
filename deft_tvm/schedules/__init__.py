"""Split-and-reduce schedules: a computation and a target in, a scheduled computation out."""

from deft_tvm.schedules.apply import apply_rules, schedule
from deft_tvm.schedules.rule import Decision, KernelTask, Knobs

__all__ = ["Decision", "KernelTask", "Knobs", "apply_rules", "schedule"]

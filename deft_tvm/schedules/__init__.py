"""Split-and-reduce schedules: a computation and a target in, a scheduled computation out."""

from deft_tvm.schedules.apply import apply_rules, schedule
from deft_tvm.schedules.rule import Decision, KernelTask, Knobs, MergeTask, PartialTask, tiles_of

__all__ = [
    "Decision",
    "KernelTask",
    "Knobs",
    "MergeTask",
    "PartialTask",
    "apply_rules",
    "schedule",
    "tiles_of",
]

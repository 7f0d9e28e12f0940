"""Split-and-reduce schedules: a computation and a target in, a scheduled computation out."""

import tvm_ffi

from deft_tvm.errors import LogError, PlanError
from deft_tvm.schedules.apply import apply_rules, schedule
from deft_tvm.schedules.rule import (
    Decision,
    KernelTask,
    Knobs,
    MergeTask,
    PartialTask,
    tiles_of,
)

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

# What is raised in a function that TVM calls, a pass or a search, comes out of TVM as RuntimeError,
# unless TVM knows it.
for _error in (KeyboardInterrupt, LogError, PlanError):
    tvm_ffi.register_error(_error.__name__, _error)

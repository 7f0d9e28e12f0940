"""Asking the rules: a task in, its scheduled kernel out; something always accepts."""

from __future__ import annotations

from tvm import IRModule, s_tir

from deft_tvm.schedules import cpu, cuda
from deft_tvm.schedules.rule import Decision, KernelTask, Knobs, PartialTask, Rule


def as_written(task: PartialTask, sch: s_tir.Schedule, knobs: Knobs) -> bool:
    """Takes every task and changes nothing: right, and slow."""
    return True


RULES: dict[str, tuple[Rule, ...]] = {
    "llvm": (*cpu.RULES, as_written),
    "cuda": (*cuda.RULES, as_written),
}
"""By target kind, in the order in which they are asked."""

MERGES = {"llvm": cpu.schedule_merge, "cuda": cuda.schedule_merge}
"""By target kind."""


def schedule(task: KernelTask, decision: Decision | None = None) -> tuple[s_tir.Schedule, Knobs]:
    """The scheduled kernel of `task`, with defaults for what `decision` does not name.

    Args:
        task: the kernel.
        decision: choices by name; None for the defaults of all.

    Raises:
        PlanError: a choice is not among its candidates.
    """
    sch = s_tir.Schedule(IRModule({task.symbol: task.computation}))
    return sch, apply_rules(task, sch, decision or {})


def apply_rules(task: KernelTask, sch: s_tir.Schedule, decision: Decision | None) -> Knobs:
    """Schedule `sch`, a schedule of the task's computation or a specialisation of it, in place.

    Args:
        task: the kernel.
        sch: the schedule.
        decision: choices by name, with defaults for the rest; None leaves all to be sampled.
    """
    sch.work_on(sch.mod.get_global_vars()[0].name_hint)
    knobs = Knobs(sch, decision)
    if isinstance(task, PartialTask):
        next(rule for rule in RULES[task.kind] if rule(task, sch, knobs))
    else:
        MERGES[task.kind](task, sch, knobs)
    return knobs

"""Asking the rules: a task in, its scheduled kernel out; something always accepts."""

from __future__ import annotations

from tvm import IRModule, s_tir

from deft_tvm.schedules import cpu, cuda
from deft_tvm.schedules.rule import Decision, KernelTask, Knobs, Rule


def as_written(task: KernelTask, sch: s_tir.Schedule, knobs: Knobs) -> bool:
    """Takes every task and changes nothing: right, and slow."""
    return True


RULES: dict[str, tuple[Rule, ...]] = {
    "llvm": (*cpu.RULES, as_written),
    "cuda": (*cuda.RULES, as_written),
}
"""By target kind, in the order in which they are asked."""


def schedule(task: KernelTask, decision: Decision | None = {}) -> tuple[s_tir.Schedule, Knobs]:  # noqa: B006
    """The scheduled kernel of `task`, with defaults for what `decision` does not name.

    Args:
        task: the kernel.
        decision: choices by name; None leaves them to be sampled.

    Raises:
        PlanError: a choice is not among its candidates.
    """
    sch = s_tir.Schedule(IRModule({task.symbol: task.computation}))
    return sch, apply_rules(task, sch, decision)


def apply_rules(task: KernelTask, sch: s_tir.Schedule, decision: Decision | None) -> Knobs:
    """Schedule `sch`, a schedule of the task's computation or a specialisation of it, in place."""
    sch.work_on(sch.mod.get_global_vars()[0].name_hint)
    knobs = Knobs(sch, decision)
    next(rule for rule in RULES[task.kind] if rule(task, sch, knobs))
    return knobs

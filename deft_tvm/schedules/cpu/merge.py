"""Merging partials on a CPU: the output width in the vector lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from deft_tvm.schedules.cpu.vector import float_lanes
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import power_of_two_in, vectorize_last


def schedule_merge(task: KernelTask, sch: Schedule, knobs: Knobs) -> None:
    """Nothing to choose, it is a few microseconds of reading."""
    lanes = power_of_two_in(task.spec.v_width, float_lanes(task.features))
    weigh = sch.get_sblock("weigh")
    d, p, share = sch.get_loops(weigh)[-3:]
    outer, inner = sch.split(d, [None, lanes])
    sch.reorder(p, share, outer, inner)
    sch.vectorize(inner)
    sch.decompose_reduction(weigh, p)
    vectorize_last(sch, "write_out", lanes)

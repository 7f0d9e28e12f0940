"""The merge of partials: a block for each row and head, a thread for each output column.

Every thread walks the row's few LSEs for itself: no thread waits for another.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from deft_tvm.schedules.cuda.shares import DEALT_THREADS
from deft_tvm.schedules.cuda.threads import LANES, by_first_thread, deal_threads, keep
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import nearest

WARPS = (1, 2, 4)
AHEAD = (1, 4, 8)
"""Partials whose loads wait for memory together."""


def merge_columns(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: the merge kernel."""
    if task.kernel != "merge":
        return False
    warps = knobs.pick("warps", WARPS, nearest(WARPS, task.spec.v_width // LANES))
    ahead = knobs.pick_number("ahead", AHEAD, 8)
    keep(sch, ("largest", "sum"), "local")
    keep(sch, ("weigh",), DEALT_THREADS)
    for block in ("weigh", "write_out"):
        deal_threads(sch, block, warps)
    for block, place in (("largest", -1), ("sum", -1), ("weigh_update", -2)):
        partials = sch.get_loops(sch.get_sblock(block))[place]
        sch.unroll(sch.split(partials, [None, ahead])[1])
    by_first_thread(sch, "write_lse", warps)
    return True

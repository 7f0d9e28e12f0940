"""The merge of partials: a block for each row and head, a thread for each output column.

Every thread walks the row's few LSEs for itself: they come out of the cache once for all, and no
thread waits for another.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from deft_tvm.schedules.cuda.threads import LANES, bind_threads, first_thread_only
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import nearest, unroll_all

WARPS = (1, 2, 4)


def merge_columns(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: the merge kernel."""
    if task.kernel != "merge":
        return False
    warps = knobs.pick("warps", WARPS, nearest(WARPS, task.spec.v_width // LANES))

    for block in ("largest", "sum", "weigh"):
        sch.set_scope(sch.get_sblock(block), 0, "local")
    weigh = sch.get_sblock("weigh")
    column, part = sch.get_loops(weigh)[-2:]
    own, warp, lane = sch.split(column, [None, warps, LANES])
    sch.reorder(warp, lane, part, own)
    bind_threads(sch, warp, lane)
    sch.decompose_reduction(weigh, part)
    write = sch.get_loops(sch.get_sblock("write_out"))[-1]
    own, warp, lane = sch.split(write, [None, warps, LANES])
    bind_threads(sch, warp, lane)
    return True

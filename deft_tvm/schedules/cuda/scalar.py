"""Partial kernels on plain FMAs: rows over warps, columns over lanes.

Every two-dimensional tile of scores, probabilities and output is dealt out to the threads, so that
scores and accumulators never leave registers, a row's maximum and sum are reductions within one
warp, and its statistics lie in the registers of all its lanes. Only K, V, Q and the probabilities,
which other threads read, are in shared memory.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from deft_tvm.schedules.blocks import matrices_of_softmax, score_products
from deft_tvm.schedules.cuda.blocks import (
    OUTPUT_PASSES,
    ROW_KEEPS,
    ROW_REDUCTIONS,
    ROW_STATES,
    SCORE_PASSES,
)
from deft_tvm.schedules.cuda.loading import load_tiles, locate_tokens
from deft_tvm.schedules.cuda.shares import DEALT, DEALT_ROWS
from deft_tvm.schedules.cuda.threads import (
    TILE_SCOPE,
    by_first_lane,
    deal,
    deal_rows,
    keep,
    reduce_in_warps,
)
from deft_tvm.schedules.rule import Knobs, PartialTask
from deft_tvm.schedules.verbs import nearest

WARPS = (2, 4, 8)


def rows_over_warps(task: PartialTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: every partial kernel that has no better one."""
    tile = task.tile
    products, made = score_products(task.spec), matrices_of_softmax(task.spec)
    warps = knobs.pick_number("warps", WARPS, nearest(WARPS, max(4, tile.lane_rows // 8)))

    locate_tokens(task, sch, warps)
    load_tiles(task, sch, knobs, warps)

    keep(sch, ("init_out", *products, "logits", *made, "accumulate"), DEALT)
    keep(sch, ("probabilities",), TILE_SCOPE)
    passes = (*SCORE_PASSES, *made, "probabilities", *OUTPUT_PASSES, "write_out")
    for block in (*products, "accumulate", *passes):
        deal(sch, block, warps)

    keep(sch, (*ROW_STATES, *ROW_REDUCTIONS), DEALT_ROWS)
    for block in ROW_REDUCTIONS:
        reduce_in_warps(sch, block, warps)
    for block in (*ROW_STATES, *ROW_KEEPS, "write_lse"):
        deal_rows(sch, block, warps)
    by_first_lane(sch, "write_lse")
    return True

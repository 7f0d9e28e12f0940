"""Partial kernels on plain FMAs: rows over warps, columns over lanes.

Every two-dimensional tile of scores, probabilities and output is dealt out to the threads, so that
scores and accumulators never leave registers, a row's maximum and sum are reductions within one
warp, and its statistics lie in the registers of all its lanes. Only K, V, Q and the probabilities,
which other threads read, are in shared memory.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

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
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import nearest

WARPS = (2, 4, 8)
ROW_BLOCKS = (
    "init_max",
    "init_sum",
    "new_max",
    "rescale",
    "new_sum",
    "keep_max",
    "keep_sum",
    "normalise",
)
ROW_REDUCTIONS = ("row_max", "row_sum")
PASSES = (
    "init_out",
    "logits",
    "masked_logits",
    "exponentials",
    "probabilities",
    "fold",
    "keep_out",
    "write_out",
)


def rows_over_warps(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: every partial kernel that has no better one."""
    tile = task.tile
    if tile is None:
        return False
    warps = knobs.pick("warps", WARPS, nearest(WARPS, max(4, tile.lane_rows // 8)))
    products = ("scores", "scores_rope") if task.spec.rope is not None else ("scores",)

    keep(sch, ("init_out", *products, "logits", "exponentials", "accumulate", "fold"), DEALT)
    keep(sch, (*ROW_BLOCKS[:5], *ROW_REDUCTIONS, "normalise"), DEALT_ROWS)
    keep(sch, ("probabilities",), TILE_SCOPE)

    locate_tokens(sch, warps)
    load_tiles(task, sch, knobs, warps)
    for block in (*products, "accumulate", *PASSES):
        deal(sch, block, warps)
    for block in ROW_REDUCTIONS:
        reduce_in_warps(sch, block, warps)
    for block in (*ROW_BLOCKS, "write_lse"):
        deal_rows(sch, block, warps)
    by_first_lane(sch, "write_lse")
    return True

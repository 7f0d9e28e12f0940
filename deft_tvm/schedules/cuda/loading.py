"""What both partial schedules do first in a step: find the tile's tokens and load them."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.cuda.copies import load_tile, whole_lanes
from deft_tvm.schedules.cuda.shares import DEALT_THREADS
from deft_tvm.schedules.cuda.staging import load_ahead
from deft_tvm.schedules.cuda.threads import LANES, TABLE_SCOPE, TILE_SCOPE, deal_threads, keep
from deft_tvm.schedules.rule import KernelTask, Knobs

TABLES = 4
STAGES = (1, 2)


def locate_tokens(sch: Schedule, warps: Any) -> None:
    """A thread for each token; whether the tile is cut is found by every warp for itself."""
    keep(sch, ("seek",), DEALT_THREADS)
    keep(sch, ("find_cut",), "local")
    locate = sch.get_sblock("locate")
    for table in range(TABLES):
        sch.set_scope(locate, table, TABLE_SCOPE)
    for block in ("seek", "locate"):
        deal_threads(sch, block, warps)
    tokens = sch.get_loops(sch.get_sblock("find_cut"))[-1]
    sch.bind(sch.split(tokens, [None, LANES])[1], "threadIdx.x")


def load_tiles(task: KernelTask, sch: Schedule, knobs: Knobs, warps: Any) -> None:
    """Q once an item, K, V and rope once a step, by all threads together."""
    spec, operand = task.spec, task.tile.operand if task.tile else ""
    regions = {"load_v": (spec.v.buffer, spec.v_width)}
    if not spec.tied:
        regions["load_k"] = (spec.k.buffer, spec.k_width)
    queries = ["load_q"]
    if spec.rope is not None:
        regions["load_rope"] = (spec.rope, spec.rope_width)
        queries.append("load_q_rope")
    keep(sch, (*queries, *regions), TILE_SCOPE)
    for block in queries:
        load_tile(sch, block, warps, 1)
    for block, (buffer, width) in regions.items():
        load_tile(sch, block, warps, whole_lanes(spec.buffers[buffer].dtype, operand, width))
    load_ahead(sch, knobs.pick("stages", STAGES, 2))

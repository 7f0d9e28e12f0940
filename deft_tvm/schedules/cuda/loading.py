"""What both partial schedules do first in a step: find the tile's tokens and load them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.kernels.numerics import storage
from deft_tvm.schedules.cuda.copies import BYTES, load_tile, whole_lanes
from deft_tvm.schedules.cuda.limits import ELEMENT_BYTES, fits_staged
from deft_tvm.schedules.cuda.shares import DEALT_THREADS
from deft_tvm.schedules.cuda.staging import load_ahead
from deft_tvm.schedules.cuda.threads import LANES, TABLE_SCOPE, TILE_SCOPE, deal_threads, keep
from deft_tvm.schedules.rule import KernelTask, Knobs

TABLES = 4
"""Tables of a tile's tokens that `locate` writes; with a window, positions too."""


def locate_tokens(task: KernelTask, sch: Schedule, warps: Any) -> None:
    """A thread for each token; whether the tile is cut is found by every warp for itself."""
    keep(sch, ("seek",), DEALT_THREADS)
    keep(sch, ("find_cut",), "local")
    locate = sch.get_sblock("locate")
    for table in range(TABLES if task.spec.window is None else TABLES + 1):
        sch.set_scope(locate, table, TABLE_SCOPE)
    by_token = ["seek", "locate"]
    if task.spec.scaled:
        for table in range(2):
            sch.set_scope(sch.get_sblock("find_scales"), table, TABLE_SCOPE)
        by_token.append("find_scales")
    for block in by_token:
        deal_threads(sch, block, warps)
    tokens = sch.get_loops(sch.get_sblock("find_cut"))[-1]
    sch.bind(sch.split(tokens, [None, LANES])[1], "threadIdx.x")


def load_tiles(task: KernelTask, sch: Schedule, knobs: Knobs, warps: Any) -> None:
    """Q once an item, K, V and rope once a step, by all threads together."""
    assert task.tile is not None
    spec, operand = task.spec, task.tile.operand
    regions = {"load_v": (spec.v.buffer, spec.v_width)}
    queries = ["load_q"]
    if not spec.tied:
        regions["load_k"] = (spec.k.buffer, spec.k_width)
    if spec.rope is not None:
        regions["load_rope"] = (spec.rope, spec.rope_width)
        queries.append("load_q_rope")
    keep(sch, (*queries, *regions), TILE_SCOPE)
    padding = BYTES if fits_staged(task, 1, BYTES) else 0
    if padding:
        _pad_rows(sch, (*queries, *regions), operand)

    for block in queries:
        load_tile(sch, block, warps, 1)
    whole = True
    for block, (buffer, width) in regions.items():
        source = spec.buffers[buffer].dtype
        lanes = whole_lanes(source, operand, width)
        load_tile(sch, block, warps, lanes)
        whole = whole and source == operand and lanes > 1

    # Only copies of 16 bytes run beside the work; what is converted passes through registers.
    two = whole and fits_staged(task, 2, padding)
    load_ahead(sch, knobs.pick("stages", (1, 2) if two else (1,), 2 if two else 1))


def _pad_rows(sch: Schedule, blocks: Iterable[str], operand: str) -> None:
    """16 bytes between rows, so that equal columns of neighbouring rows lie in other banks."""
    lanes = BYTES // ELEMENT_BYTES[storage(operand)]
    for block in blocks:
        sch.storage_align(sch.get_sblock(block), 0, -2, 2 * lanes, lanes)

"""What both partial schedules do first in a step: find the tile's tokens and load them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from deft_tvm.dtypes import DTYPE_BYTES, Dtype
from deft_tvm.kernels.tokens import located_tiles
from deft_tvm.plan.residency import PADDING
from deft_tvm.schedules.cuda.copies import LATER, NOW, load_tile, whole_lanes
from deft_tvm.schedules.cuda.limits import BLOCKS, fits_staged, most_blocks
from deft_tvm.schedules.cuda.shares import DEALT_THREADS
from deft_tvm.schedules.cuda.staging import load_ahead
from deft_tvm.schedules.cuda.threads import LANES, TABLE_SCOPE, TILE_SCOPE, deal_threads, keep
from deft_tvm.schedules.rule import Knobs, PartialTask

STAGES = (2, 3, 4)
"""Tiles of K and V for which there may be room, that of the step's own included."""
TABLES = 4
"""Tables of a tile's tokens that `locate` writes; with a window, positions too."""


def locate_tokens(task: PartialTask, sch: Schedule, warps: Any) -> None:
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


def load_tiles(
    task: PartialTask, sch: Schedule, knobs: Knobs, warps: Any, panel: int | None = None
) -> None:
    """Q once an item, K, V and rope once a step, by all threads together.

    Args:
        panel: columns of the panels that tiles lie in, whose rows are permuted; None: rows whole.
    """
    spec, tile, operand = task.spec, task.tile, task.tile.operand
    regions = {"load_v": (spec.v.buffer, spec.v_width)}
    queries = {"load_q": spec.k_width}
    if not spec.tied:
        regions["load_k"] = (spec.k.buffer, spec.k_width)
    if spec.rope is not None:
        regions["load_rope"] = (spec.rope, spec.rope_width)
        queries["load_q_rope"] = spec.rope_width
    keep(sch, (*queries, *regions), TILE_SCOPE)
    padding = PADDING if panel is None and fits_staged(task, 1, PADDING) else 0
    if padding:
        pad_rows(sch, map(sch.get_sblock, (*queries, *regions)), operand)
    if panel is not None:
        lay_in_panels(sch, (*queries, *regions), panel)

    whole = all(
        spec.buffers[buffer].dtype == operand and whole_lanes(operand, operand, width) > 1
        for buffer, width in regions.values()
    )
    located = located_tiles(tile)
    # Only copies of 16 bytes run beside the work; what is converted passes through registers.
    ahead = [n for n in STAGES if whole and n - 1 <= located and fits_staged(task, n, padding)]
    # Panels are read by hardware of its own, to which only waits for copies show them.
    possible = ahead if panel is not None else [1, *ahead]
    stages = knobs.pick_number("stages", possible, 2 if ahead else 1)
    for block, width in queries.items():
        # Beside the search for the first tokens, with which they are waited for.
        lanes = whole_lanes(spec.dtype, operand, width)
        beside = stages > 1 and spec.dtype == operand
        load_tile(sch, block, warps, lanes, LATER if beside else NOW, panel is not None)
    for block, (buffer, width) in regions.items():
        lanes = whole_lanes(spec.buffers[buffer].dtype, operand, width)
        load_tile(sch, block, warps, lanes, NOW, panel is not None)
    load_ahead(sch, stages, located, fenced=panel is not None)
    _leave_room(task, sch, knobs, int(warps), stages, padding)


def _leave_room(
    task: PartialTask, sch: Schedule, knobs: Knobs, warps: int, stages: int, padding: int
) -> None:
    """Bound the registers of a thread, so that others may be on its multiprocessor."""
    most = most_blocks(task, warps, stages, padding)
    room = [blocks for blocks in (1, 2, 3, 4) if blocks <= most]
    blocks = knobs.pick("blocks", room, min(2, room[-1]))
    sch.annotate(sch.get_loops(sch.get_sblock("tile"))[-1], BLOCKS, blocks)


def pad_rows(sch: Schedule, blocks: Iterable[SBlockRV], operand: Dtype) -> None:
    """`PADDING` between rows of what each block writes."""
    lanes = PADDING // DTYPE_BYTES[operand]
    for block in blocks:
        sch.storage_align(block, 0, -2, 2 * lanes, lanes)


def lay_in_panels(sch: Schedule, blocks: Iterable[str], columns: int) -> None:
    """Each tile as [panel, row, column of the panel]."""
    for block in blocks:
        sch.transform_layout(
            sch.get_sblock(block), ("write", 0), lambda i, j: (j // columns, i, j % columns)
        )

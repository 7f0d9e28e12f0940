"""Verbs of every CUDA schedule: which thread does what.

A block is ``threadIdx.y`` warps of 32 lanes, the same in every loop nest of a kernel. A nest that
has fewer elements than threads is guarded by the predicate that ``split`` adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

LANES = 32
SHARED = "shared.dyn"


def bind_threads(sch: Schedule, warp: LoopRV, lane: LoopRV) -> None:
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


def share(sch: Schedule, blocks: Iterable[str]) -> None:
    """Keep what each block writes in shared memory."""
    for block in blocks:
        sch.set_scope(sch.get_sblock(block), 0, SHARED)


def load_together(sch: Schedule, block: str, warps: Any, lanes: int) -> None:
    """All threads copy the block's two-dimensional tile, `lanes` elements at once."""
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(block))[-2:])
    _, warp, lane, vector = sch.split(fused, [None, warps, LANES, lanes])
    bind_threads(sch, warp, lane)
    sch.vectorize(vector)


def one_each(sch: Schedule, block: SBlockRV, warps: Any) -> None:
    """A thread for each index of the block's first own loop."""
    loop = sch.get_loops(block)[-1]
    _, warp, lane = sch.split(loop, [None, warps, LANES])
    bind_threads(sch, warp, lane)

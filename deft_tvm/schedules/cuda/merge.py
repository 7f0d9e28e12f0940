"""The merge of partials: a block for each row and head, whose warps share the partials.

A row's LSEs are reduced by the lanes of each warp for itself. Of the outputs every warp weighs its
own, each lane some columns; then the warps' sums are added. A row that was cut in hundreds of
pieces, as one long sequence is, so waits for memory a few times and not hundreds.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from deft_tvm.schedules.cuda.shares import DEALT, DEALT_FOURS, DEALT_THREADS, FOUR
from deft_tvm.schedules.cuda.threads import (
    LANES,
    TABLE_SCOPE,
    bind_threads,
    by_first_thread,
    deal_threads,
    keep,
)
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import unroll_all

WARPS = (1, 2, 4, 8)
"""Divisors of `kernels.merge.CUDA_SHARES`."""
AHEAD = (1, 2, 4)
"""Partials of a warp whose loads wait for memory together."""


def schedule_merge(task: KernelTask, sch: Schedule, knobs: Knobs) -> None:
    """Partials to warps, columns to their lanes."""
    warps = knobs.pick_number("warps", WARPS, 4)
    ahead = knobs.pick_number("ahead", AHEAD, 2)
    keep(sch, ("largest", "sum"), "local")
    for block in ("largest", "sum"):
        partials = sch.get_loops(sch.get_sblock(block))[-1]
        sch.bind(sch.split(partials, [None, LANES])[1], "threadIdx.x")
    keep(sch, ("weigh",), DEALT_THREADS)
    _weigh(sch, warps, ahead, FOUR if task.spec.v_width % FOUR == 0 else 1)
    deal_threads(sch, "write_out", warps)
    by_first_thread(sch, "write_lse", warps)


def _weigh(sch: Schedule, warps: int, ahead: int, width: int) -> None:
    """Partials to warps and columns to lanes, `width` at a time; then a thread for a column adds
    the warps' sums."""
    shares = sch.get_loops(sch.get_sblock("weigh"))[-1]
    mine, _ = sch.split(shares, [warps, None])
    of_warp = sch.rfactor(mine, 0)
    sch.set_scope(of_warp, 0, DEALT if width == 1 else DEALT_FOURS)
    told = sch.cache_read(sch.get_sblock("weigh"), 0, TABLE_SCOPE)
    deal_threads(sch, "weigh", warps)

    column, rounds, warp, shares = sch.get_loops(of_warp)[-4:]
    columns, lane, own = sch.split(column, [None, LANES, width])
    rounds, inner = sch.split(rounds, [None, ahead])
    sch.reorder(warp, lane, rounds, inner, shares, columns, own)
    bind_threads(sch, warp, lane)
    unroll_all(sch, (inner, shares, columns))
    sch.vectorize(own)
    sch.decompose_reduction(of_warp, rounds)

    warp, column = sch.get_loops(told)[-2:]
    columns, lane, own = sch.split(column, [None, LANES, width])
    sch.reorder(warp, lane, columns, own)
    bind_threads(sch, warp, lane)
    sch.unroll(columns)
    sch.vectorize(own)

"""Elements of 16 bits in pairs, as ``vdpbf16ps`` multiplies them."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.cpu.instructions import LANES, interleave


def pairs_of_first(j: Any, d: Any) -> tuple[Any, Any, Any]:
    """[token, d] → [token / 2, d, token % 2]."""
    return j // 2, d, j % 2


def pairs_of_second(i: Any, d: Any) -> tuple[Any, Any, Any]:
    """[row, d] → [d / 2, row, d % 2]: two neighbours of the reduction beside each other."""
    return d // 2, i, d % 2


def pair_values(sch: Schedule, tied: bool) -> None:
    """V with each two tokens interleaved, which the output's product reads in pairs.

    `tied`: keys lie in V, too, which is kept as it is beside a copy in pairs. Otherwise two tokens
    at a time are interleaved as they come out of their pages, and no tile of them is written.
    """
    if tied:
        pairs = sch.cache_read(sch.get_sblock("accumulate"), 1, "global")
    else:
        pairs = sch.cache_write(sch.get_sblock("load_v"), 0, "global")
    sch.transform_layout(pairs, ("write", 0), pairs_of_first)
    j, d = sch.get_loops(pairs)[-2:]
    j_outer, j_pair = sch.split(j, [None, 2])
    d_outer, d_lanes = sch.split(d, [None, LANES])
    sch.reorder(j_outer, d_outer, j_pair, d_lanes)
    if not tied:
        load = sch.get_sblock("load_v")
        sch.compute_at(load, d_outer)
        sch.unroll(sch.get_loops(load)[-2])
    sch.tensorize(j_pair, interleave())

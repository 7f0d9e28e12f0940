"""V in pairs of tokens, as ``vdpbf16ps`` multiplies it with pairs of probabilities."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.cpu.instructions import interleave


def pairs_of_first(j: Any, d: Any) -> tuple[Any, Any, Any]:
    """[token, d] → [token / 2, d, token % 2]."""
    return j // 2, d, j % 2


def pairs_of_second(i: Any, d: Any) -> tuple[Any, Any, Any]:
    """[row, d] → [d / 2, row, d % 2]: two neighbours of the reduction beside each other."""
    return d // 2, i, d % 2


def pair_values(sch: Schedule) -> None:
    """A copy of V with each two tokens interleaved, which the output's product reads in pairs."""
    copy = sch.cache_read(sch.get_sblock("accumulate"), 1, "global")
    sch.transform_layout(copy, ("write", 0), pairs_of_first)
    j, d = sch.get_loops(copy)[-2:]
    j_outer, j_pair = sch.split(j, [None, 2])
    d_outer, d_lanes = sch.split(d, [None, 16])
    sch.reorder(j_outer, d_outer, j_pair, d_lanes)
    sch.tensorize(j_pair, interleave())

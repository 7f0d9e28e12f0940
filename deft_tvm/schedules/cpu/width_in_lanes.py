"""Few rows on a CPU: the head width in the vector lanes, so that a token is read once for all rows.

With fewer lane rows than a vector has lanes the work is bound by reading the KV. Tiles keep their
natural layout:

    scores        a token's key stays in the nearest cache while every row takes its dot product
    accumulate    rows × a part of the width in registers, walking down the tile's tokens
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.cpu.instructions import dot, dot_llvm
from deft_tvm.schedules.cpu.vector import float_lanes, registers
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import (
    divisors,
    import_llvm,
    nearest,
    power_of_two_in,
    store_tile,
    unroll_all,
    vectorize_last,
)


def width_in_lanes(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: partial kernels of few rows."""
    if task.tile is None or not _accepts(task):
        return False
    spec, tile, lanes = task.spec, task.tile, float_lanes(task.features)
    v_lanes = power_of_two_in(spec.v_width, lanes)
    token_choices = divisors(tile.kv_tile, (1, 2, 4, 8))
    score_tokens = knobs.pick("score_tokens", token_choices, nearest(token_choices, 2))
    part_choices = divisors(spec.v_width, [v_lanes * n for n in (1, 2, 4, 8)])
    fits = registers(task.features) // 2 * v_lanes // tile.lane_rows
    out_dims = knobs.pick("out_dims", part_choices, nearest(part_choices, fits))

    widths = {"scores": spec.k_width}
    if spec.rope is not None:
        widths["scores_rope"] = spec.rope_width
    for block, width in widths.items():
        _dot_products(sch, block, width, tile.operand, score_tokens)
    import_llvm(sch, "item", dot_llvm(widths.values(), lanes, tile.operand))
    _weighted_sum(sch, out_dims, v_lanes)

    for block in ("init_out", "keep_out", "write_out", "load_v"):
        vectorize_last(sch, block, v_lanes)
    keys = ["load_q"] if spec.tied else ["load_q", "load_k"]
    rotated = ["load_q_rope", "load_rope"] if spec.rope is not None else []
    for block, width in {
        **dict.fromkeys(keys, spec.k_width),
        **dict.fromkeys(rotated, spec.rope_width),
    }.items():
        vectorize_last(sch, block, power_of_two_in(width, lanes))
    token_lanes = power_of_two_in(tile.kv_tile, lanes)
    for block in ("logits", "masked_logits", "exponentials", "probabilities"):
        vectorize_last(sch, block, token_lanes)
    return True


def _accepts(task: KernelTask) -> bool:
    """float32 rows of some even width; bfloat16 rows where 32 elements are multiplied at once."""
    spec, tile = task.spec, task.tile
    widths = [spec.k_width] if spec.rope is None else [spec.k_width, spec.rope_width]
    if tile is not None and tile.operand == "bfloat16":
        return "avx512bf16" in task.features and all(width % 32 == 0 for width in widths)
    even = all(width % 2 == 0 for width in (*widths, spec.v_width))
    return tile is not None and tile.operand == "float32" and even


def _dot_products(sch: Schedule, block_name: str, width: int, operand: str, tokens: Any) -> None:
    """for j: for i: S[i, j] = dot(Q[i], K[j]), a few tokens at a time."""
    block = sch.get_sblock(block_name)
    i, j, d = sch.get_loops(block)[-3:]
    j_outer, j_inner = sch.split(j, [None, tokens])
    sch.reorder(j_outer, i, j_inner, d)
    unroll_all(sch, (i, j_inner))
    sch.decompose_reduction(block, d)
    sch.tensorize(d, dot(width, operand))


def _weighted_sum(sch: Schedule, out_dims: Any, lanes: int) -> None:
    """for d/out_dims: for j: U[:, d : d + out_dims] += P[:, j] V[j, d : d + out_dims]."""
    block = sch.get_sblock("accumulate")
    i, d, j = sch.get_loops(block)[-3:]
    d_outer, d_part = sch.split(d, [None, out_dims])
    d_across, d_lanes = sch.split(d_part, [None, lanes])
    sch.reorder(d_outer, j, i, d_across, d_lanes)
    result = sch.cache_write(block, 0, "global")
    sch.reverse_compute_at(result, d_outer)
    sch.reverse_compute_inline(sch.get_sblock("fold"))
    unroll_all(sch, (i, d_across))
    sch.vectorize(d_lanes)
    sch.decompose_reduction(block, j)
    store_tile(sch, result, lanes)

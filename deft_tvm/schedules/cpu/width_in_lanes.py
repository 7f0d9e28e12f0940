"""Few rows on a CPU: the head width in the vector lanes, so that a token is read once for all rows.

With fewer lane rows than a vector has lanes the work is bound by reading the KV. Tiles keep their
natural layout:

    scores        a token's key stays in the nearest cache while every row takes its dot product
    accumulate    rows × a part of the width in registers, walking down the tile's tokens
"""

from __future__ import annotations

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
    """The rule: partial kernels of few rows, with float32 products."""
    if task.tile is None or task.tile.operand != "float32":
        return False
    spec, tile, lanes = task.spec, task.tile, float_lanes(task.features)
    k_lanes = power_of_two_in(spec.k_width, lanes)
    v_lanes = power_of_two_in(spec.v_width, lanes)
    rope_lanes = power_of_two_in(spec.rope_width, lanes) if spec.rope is not None else lanes
    if min(k_lanes, v_lanes, rope_lanes) < 2:
        return False
    token_choices = divisors(tile.kv_tile, (1, 2, 4, 8))
    score_tokens = knobs.pick("score_tokens", token_choices, nearest(token_choices, 2))
    part_choices = divisors(spec.v_width, [v_lanes * n for n in (1, 2, 4, 8)])
    fits = registers(task.features) // 2 * v_lanes // tile.lane_rows
    out_dims = knobs.pick("out_dims", part_choices, nearest(part_choices, fits))

    _dot_products(sch, "scores", spec.k_width, score_tokens)
    dots = [(spec.k_width, k_lanes)]
    if spec.rope is not None:
        _dot_products(sch, "scores_rope", spec.rope_width, score_tokens)
        dots.append((spec.rope_width, rope_lanes))
    import_llvm(sch, "item", dot_llvm(dots))
    _weighted_sum(sch, out_dims, v_lanes)

    for block in ("init_out", "keep_out", "write_out", "load_v"):
        vectorize_last(sch, block, v_lanes)
    for block in ("load_q",) if spec.tied else ("load_q", "load_k"):
        vectorize_last(sch, block, k_lanes)
    if spec.rope is not None:
        for block in ("load_q_rope", "load_rope"):
            vectorize_last(sch, block, rope_lanes)
    token_lanes = power_of_two_in(tile.kv_tile, lanes)
    for block in ("logits", "masked_logits", "exponentials", "probabilities"):
        vectorize_last(sch, block, token_lanes)
    return True


def _dot_products(sch: Schedule, block_name: str, width: int, tokens: object) -> None:
    """for j: for i: S[i, j] = dot(Q[i], K[j]), a few tokens at a time."""
    block = sch.get_sblock(block_name)
    i, j, d = sch.get_loops(block)[-3:]
    j_outer, j_inner = sch.split(j, [None, tokens])
    sch.reorder(j_outer, i, j_inner, d)
    unroll_all(sch, (i, j_inner))
    sch.decompose_reduction(block, d)
    sch.tensorize(d, dot(width))


def _weighted_sum(sch: Schedule, out_dims: object, lanes: int) -> None:
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

"""Few rows on a CPU: the head width in the vector lanes, so that a token is read once for all rows.

With fewer lane rows than a vector has lanes the work is bound by reading the KV. Keys stay in their
pages where products take their type, float32's any but 8 bits, and so does V where it is read once;
tiles keep their natural layout:

    scores        products of a few rows and tokens at a time, see `dot_products`
    accumulate    rows × a part of the width in registers, walking down the tile's tokens, by two
                  where bfloat16 is multiplied in pairs
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.blocks import matrices_of_softmax, score_products
from deft_tvm.schedules.cpu.blocks import asked_beside, load_widths, query_widths
from deft_tvm.schedules.cpu.dot_products import (
    Dots,
    declarations,
    dots,
    dots_llvm,
    lanes_of,
    tokens_of,
)
from deft_tvm.schedules.cpu.instructions import dot_pairs
from deft_tvm.schedules.cpu.pairs import pair_values
from deft_tvm.schedules.cpu.reductions import reduce_rows, reductions_llvm
from deft_tvm.schedules.cpu.references import REFERENCES_LLVM, refer_to_rows, stored_where
from deft_tvm.schedules.cpu.vector import REGISTERS, float_lanes, registers
from deft_tvm.schedules.rule import Knobs, PartialTask
from deft_tvm.schedules.verbs import (
    divisors,
    import_llvm,
    nearest,
    power_of_two_in,
    spread,
    store_tile,
    unroll_all,
    vectorize_last,
)
from deft_tvm.spec import TileShape

STRETCH = 8
"""Tokens between which V is asked for ahead."""

FEW_REGISTERS = 16
"""Up to so many a product's width is a loop. As one piece LLVM orders it product by product, and
keeps in memory what it loads for the next: one sequence of 65,536 in float32 takes 0.95 of its time
as a loop, and 0.87 of that with two tokens a step for four (AMD EPYC Zen 1, 2026-11-28)."""

KEYS = {"scores": "load_k", "scores_rope": "load_rope"}
"""What loads the keys of each product."""


def width_in_lanes(task: PartialTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: partial kernels of few rows."""
    if not _accepts(task):
        return False
    spec, tile, lanes = task.spec, task.tile, float_lanes(task.features)
    v_lanes, paired = power_of_two_in(spec.v_width, lanes), _paired(task)
    loads = load_widths(spec)
    stay = {load: stored for load in loads if (stored := stored_where(spec, load, tile.operand))}
    products = {
        block: _dots(width, tile, task.features, stay.get(KEYS[block], ""))
        for block, width in score_products(spec).items()
    }
    widest = max(made.tokens for made in products.values())
    token_choices = divisors(tile.kv_tile, [widest * n for n in (1, 2, 4)])
    score_tokens = knobs.pick_parts("score_tokens", tile.kv_tile, token_choices, token_choices[0])
    part_choices = divisors(spec.v_width, [v_lanes * n for n in (1, 2, 4, 8)])
    # From 1 KiB on a tile is a workspace on the heap, to which LLVM stores at every step whatever
    # is no vector code of TVM's own.
    most = registers(task.features) // (4 if paired else 2)
    fits = most * v_lanes // tile.lane_rows
    out_dims = knobs.pick_parts("out_dims", spec.v_width, part_choices, nearest(part_choices, fits))

    for block, made in products.items():
        _dot_products(sch, block, made, score_tokens, asked_beside(spec, block))
    functions = "".join(sorted({dots_llvm(made) for made in products.values()}))
    used = declarations(tile.operand, [made.lanes for made in products.values()])
    import_llvm(sch, "item", functions + used + reductions_llvm(tile.kv_tile) + REFERENCES_LLVM)
    reduce_rows(sch, tile.kv_tile)
    if paired:
        pair_values(sch, spec.tied)
    elif not spec.tied:
        sch.compute_inline(sch.get_sblock("load_v"))
        del loads["load_v"]
    _weighted_sum(sch, out_dims, v_lanes, tile.kv_tile // STRETCH, paired)

    for block in ("init_out", "keep_out", "write_out"):
        vectorize_last(sch, block, v_lanes)
    for load, stored in stay.items():
        refer_to_rows(sch, load, loads.pop(load), stored, tile.operand)
    for block, width in (query_widths(spec) | loads).items():
        vectorize_last(sch, block, power_of_two_in(width, lanes))
    token_lanes = power_of_two_in(tile.kv_tile, lanes)
    passes = ("logits", "masked_logits", *matrices_of_softmax(spec), "probabilities")
    for block in passes:
        vectorize_last(sch, block, token_lanes)
    return True


def _paired(task: PartialTask) -> bool:
    """Whether the output's product takes tokens in pairs.

    One row is not worth interleaving V for.
    """
    spec, tile = task.spec, task.tile
    return (
        tile.operand == "bfloat16"
        and tile.lane_rows > 1
        and spec.v_width % 16 == 0
        and tile.kv_tile % (2 * STRETCH) == 0
    )


def _accepts(task: PartialTask) -> bool:
    """float32 rows of some even width; bfloat16 rows where 32 elements are multiplied at once.

    Steps are halved until one token is left, so that they must be powers of two.
    """
    spec, tile = task.spec, task.tile
    if tile.kv_tile & (tile.kv_tile - 1):
        return False
    widths = [spec.k_width] if spec.rope is None else [spec.k_width, spec.rope_width]
    if tile.operand == "bfloat16":
        return "avx512bf16" in task.features and all(width % 32 == 0 for width in widths)
    even = all(width % 2 == 0 for width in (*widths, spec.v_width))
    return tile.operand == "float32" and even


def _dots(width: int, tile: TileShape, features: Set[str], stored: str) -> Dots:
    """How many tokens of one product are multiplied with all rows at a time."""
    lanes = lanes_of(width, tile.operand, min(float_lanes(features), tile.kv_tile))
    tokens = tokens_of(tile.lane_rows, lanes)
    looped = registers(features) <= FEW_REGISTERS
    return Dots(width, tile.operand, tile.lane_rows, tokens, lanes, stored, looped)


def _dot_products(
    sch: Schedule, block_name: str, made: Dots, parts: Any, ahead: str | None
) -> None:
    """for j/tokens: S[:, j : j + tokens] = Q · K[j : j + tokens]."""
    block = sch.get_sblock(block_name)
    i, j, d = sch.get_loops(block)[-3:]
    j_outer, j_across, j_inner = sch.split(j, [parts, None, made.tokens])
    sch.reorder(j_outer, j_across, i, j_inner, d)
    if ahead is not None:
        spread(sch, ahead, (j_outer,), (parts,))
    whole = j_inner if made.rows == 1 else i
    zero = sch.decompose_reduction(block, whole)
    sch.vectorize(sch.get_loops(zero)[-1])
    sch.tensorize(whole, dots(made))


def _weighted_sum(sch: Schedule, parts: Any, lanes: int, stretches: int, paired: bool) -> None:
    """for d/out_dims: for j: U[:, d : d + out_dims] += P[:, j] V[j, d : d + out_dims].

    `paired`: two tokens at a time. V is asked for ahead between stretches of tokens: beside each
    token, LLVM would store the register tile every time.
    """
    block = sch.get_sblock("accumulate")
    i, d, j = sch.get_loops(block)[-3:]
    d_outer, d_across, d_lanes = sch.split(d, [parts, None, lanes])
    stretch, *tokens = sch.split(j, [stretches, None, 2] if paired else [stretches, None])
    sch.reorder(d_outer, stretch, tokens[0], i, d_across, d_lanes, *tokens[1:])
    d_outer, stretch = spread(sch, "ahead_v", (d_outer, stretch), (parts, stretches))
    result = sch.cache_write(block, 0, REGISTERS)
    sch.reverse_compute_at(result, d_outer)
    sch.reverse_compute_inline(sch.get_sblock("fold"))
    unroll_all(sch, (i, d_across))
    if paired:
        zero = sch.decompose_reduction(block, stretch)
        sch.tensorize(d_lanes, dot_pairs(pair_first=True))
        sch.vectorize(sch.get_loops(zero)[-1])
    else:
        sch.vectorize(d_lanes)
        sch.decompose_reduction(block, stretch)
    store_tile(sch, result, lanes)

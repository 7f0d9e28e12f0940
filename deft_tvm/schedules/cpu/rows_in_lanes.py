"""Many rows on a CPU: query rows in the vector lanes.

Tiles are transposed (see `transposed`), so that K and V elements are broadcast scalars and need no
transpose themselves.

    scores        8 tokens × 32 rows of accumulators stay in registers over the whole width
    accumulate    8 dims × 32 rows likewise over the tile's tokens, folded into O as they leave

With bfloat16 operands and ``vdpbf16ps`` both products run over pairs: of dims for the scores, of
tokens for the output.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.blocks import score_products
from deft_tvm.schedules.cpu.blocks import asked_beside
from deft_tvm.schedules.cpu.instructions import (
    BFLOAT16_LLVM,
    dot_pairs,
)
from deft_tvm.schedules.cpu.pairs import pair_values
from deft_tvm.schedules.cpu.transposed import narrow_in_pairs, pass_over_rows, transpose
from deft_tvm.schedules.cpu.trimmed import (
    DEPTH,
    ELEMENTS,
    PARTS,
    VECTORS,
    over_rows,
    within_block,
)
from deft_tvm.schedules.cpu.turns import turns_llvm
from deft_tvm.schedules.cpu.vector import REGISTERS, float_lanes, registers
from deft_tvm.schedules.rule import Knobs, PartialTask
from deft_tvm.schedules.tiles import pairs_fit
from deft_tvm.schedules.verbs import (
    divisors,
    import_llvm,
    nearest,
    spread,
    store_tile,
    unroll_all,
    vectorize_over,
)


def rows_in_lanes(task: PartialTask, sch: Schedule, knobs: Knobs) -> bool:
    """The rule: partial kernels whose lane rows fill whole vectors."""
    lanes = float_lanes(task.features)
    if task.tile.lane_rows < 16 or task.tile.lane_rows % lanes:
        return False
    paired = _paired(task)
    tile, spec = task.tile, task.spec
    # A register tile under 1 KiB is a stack slot and stays in registers; a larger one is a heap
    # workspace, from which only TVM's own vector code (with its aliasing facts) is promoted.
    vectors = (1, 2, 3) if paired else (1, 2, 4)
    row_choices = divisors(tile.lane_rows, [lanes * n for n in vectors])
    deepest = 16 if not paired else 8 if tile.lane_rows == lanes else 4
    deep_choices = [deep for deep in (1, 2, 4, 8, 16) if deep <= deepest]
    rows = nearest(row_choices, (3 if paired else 2) * lanes)
    deep = registers(task.features) // 2 * lanes // rows
    score_rows = knobs.pick_parts("score_rows", tile.lane_rows, row_choices, rows)
    token_choices = divisors(tile.kv_tile, deep_choices)
    score_tokens = knobs.pick_parts(
        "score_tokens", tile.kv_tile, token_choices, nearest(token_choices, deep)
    )
    out_rows = knobs.pick_parts("out_rows", tile.lane_rows, row_choices, rows)
    dim_choices = divisors(spec.v_width, deep_choices)
    out_dims = knobs.pick_parts("out_dims", spec.v_width, dim_choices, nearest(dim_choices, deep))

    transpose(sch, spec, lanes, paired)
    for product in score_products(spec):
        ahead = asked_beside(spec, product)
        _product(sch, product, score_tokens, score_rows, lanes, paired, ahead)
    if paired:
        pair_values(sch, spec.tied)
    _product(sch, "accumulate", out_dims, out_rows, lanes, paired, "ahead_v", fold="fold")

    pass_over_rows(sch, spec, tile.lane_rows, lanes)
    import_llvm(sch, "item", turns_llvm(lanes) + (BFLOAT16_LLVM if paired else ""))
    if paired:
        narrow_in_pairs(sch)
    else:
        over_rows(sch, vectorize_over(sch, "probabilities", 0, lanes), tile.lane_rows)
    return True


def _paired(task: PartialTask) -> bool:
    tile, spec = task.tile, task.spec
    return (
        tile.operand == "bfloat16"
        and "avx512bf16" in task.features
        and pairs_fit(spec)
        and tile.kv_tile % 2 == 0
    )


def _product(
    sch: Schedule,
    name: str,
    deep_parts: Any,
    row_parts: Any,
    lanes: int,
    paired: bool,
    ahead: str | None,
    fold: str | None = None,
) -> None:
    """One of the two products on a register tile of `deep` × `rows`, the reduction outside it.

    for i, j, k: C[j, i] += …
    → for i/rows, j/deep:  c[deep, rows] = 0;  for k: c += …;  C[…] = c   (or fold, then store)
    """
    block = sch.get_sblock(name)
    i, j, k = sch.get_loops(block)[-3:]
    lane_rows = int(sch.get(i).extent)
    j_outer, j_tile = sch.split(j, [deep_parts, None])
    i_outer, i_across, i_lanes = sch.split(i, [row_parts, None, lanes])
    if paired:
        k, pair = sch.split(k, [None, 2])
        sch.reorder(i_outer, j_outer, k, j_tile, i_across, i_lanes, pair)
    else:
        sch.reorder(i_outer, j_outer, k, j_tile, i_across, i_lanes)
    steps_ahead = []
    if ahead is not None:
        i_outer, j_outer = spread(sch, ahead, (i_outer, j_outer), (row_parts, deep_parts))
        steps_ahead = [sch.get_loops(sch.get_sblock(ahead))[-1]]
    result = sch.cache_write(block, 0, REGISTERS)
    sch.reverse_compute_at(result, j_outer)
    if fold is not None:
        sch.reverse_compute_inline(sch.get_sblock(fold))
    unroll_all(sch, (i_across, j_tile))
    if paired:
        zero = sch.decompose_reduction(block, k)
        sch.tensorize(i_lanes, dot_pairs())
        sch.vectorize(sch.get_loops(zero)[-1])
    else:
        sch.vectorize(i_lanes)
        zero = sch.decompose_reduction(block, k)
    store_tile(sch, result, lanes)
    others = [sch.get_loops(stage)[-3:] for stage in (zero, result)]
    deep, across, elements = zip((j_tile, i_across, i_lanes), *others, strict=True)
    within_block(sch, PARTS, [j_outer])
    within_block(sch, DEPTH, [*deep, *steps_ahead])
    within_block(sch, VECTORS, across)
    if not paired:
        within_block(sch, ELEMENTS, elements)
    over_rows(sch, i_outer, lane_rows)

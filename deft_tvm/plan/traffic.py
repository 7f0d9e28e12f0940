"""Bytes and FLOPs of a plan, counted from the arrays that the kernels read.

A unit is one item under the KV heads that its tile class takes at a time. It reads each token once,
whatever rows it holds, and looks one page index up for each page that a run touches. Stage 2 reads
what stage 1 wrote. Caches are not modelled, but for a rope that the heads of an item share: these
are the bytes asked for, and what sharing saves is fewer requests.

Beside it stands sequence-based decoding, which DeFT (ICLR 2025, table 17) compares with: every row
reads every token of its own path for itself, in one pass and so without partials.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from deft_tvm.dtypes import DTYPE_BYTES
from deft_tvm.plan.columns import Item, Run
from deft_tvm.plan.cost import Ints, kv_bytes, partial_bytes
from deft_tvm.plan.layout import Plan
from deft_tvm.plan.split import ranges
from deft_tvm.spec import AttentionSpec

if TYPE_CHECKING:
    from deft_tvm.tree import Forest

INDEX_BYTES = 4
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes moved by kind, for one layer and one step.

    Attributes:
        k: keys without their rope part; 0 where they lie inside the values.
        v: values.
        rope: rotated keys, once for all KV heads if they share them.
        q: query rows, once for each item that holds the row.
        partials: float32 outputs and LSE of stage 1, written and read.
        output: output rows and their float32 LSE.
        indices: the plan's arrays, and the scales of pages in 8 bits.
    """

    k: int
    v: int
    rope: int
    q: int
    partials: int
    output: int
    indices: int

    @property
    def kv(self) -> int:
        return self.k + self.v + self.rope

    @property
    def total(self) -> int:
        return self.kv + self.q + self.partials + self.output + self.indices


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one layer and step of a plan moves and computes, beside sequence-based decoding.

    Attributes:
        tree: bytes of the plan.
        sequence: bytes if every row read its own path.
        flops: both products over the visible (row, token) pairs; sharing does not change them.
        tile_flops: both products as kernels compute them, in whole steps of tokens and of lane
            rows, those that hold nothing included.
    """

    tree: Bytes
    sequence: Bytes
    flops: int
    tile_flops: int

    @property
    def kv_saved_percent(self) -> float:
        """KV bytes that sharing saves, in percent of sequence-based decoding's."""
        return 100 * (1 - self.tree.kv / self.sequence.kv) if self.sequence.kv else 0.0

    def __str__(self) -> str:
        lines = [f"{'MiB':10}{'plan':>12}{'by sequence':>14}"]
        for name in (*(field.name for field in fields(Bytes)), "total"):
            tree, sequence = getattr(self.tree, name), getattr(self.sequence, name)
            lines.append(f"{name:10}{tree / MIB:12.3f}{sequence / MIB:14.3f}")
        share = self.flops / self.tile_flops if self.tile_flops else 1.0
        lines.append(f"KV bytes saved: {self.kv_saved_percent:.1f} %")
        lines.append(f"GFLOP: {self.flops / 1e9:.3f}, {share:.0%} of what the tiles compute")
        return "\n".join(lines)


def traffic(plan: Plan, spec: AttentionSpec) -> Traffic:
    """Count what `plan` moves and computes for one layer of `spec`."""
    path = row_tokens(plan.forest, plan.window)
    widths = spec.q_width + spec.v_width
    read = int(plan.items[:, Item.NUM_TOKENS].sum(dtype=np.int64))
    seen = int(path.sum())
    page_reads = int((-(-path // plan.page_size)).sum()) * _words_a_page(spec)
    partials = 2 * plan.num_partials * partial_bytes(spec)
    held = int(plan.items[:, Item.NUM_ROWS].sum(dtype=np.int64))
    return Traffic(
        tree=_bytes(plan, spec, read, held, partials, _index_words(plan, spec)),
        sequence=_bytes(plan, spec, seen, plan.num_rows, 0, page_reads * spec.num_kv_heads),
        flops=visible_flops(spec, seen),
        tile_flops=2 * widths * spec.num_kv_heads * _tile_pairs(plan),
    )


def visible_flops(spec: AttentionSpec, pairs: int) -> int:
    """Both products over so many visible (row, token) pairs."""
    return 2 * (spec.q_width + spec.v_width) * spec.num_q_heads * pairs


def row_tokens(forest: Forest, window: int | None) -> Ints:
    """int[R], tokens that each row sees, in the caller's order of rows."""
    node, within = ranges(forest.rows)
    own = np.minimum(forest.lengths[node], forest.diagonal[node] + within + 1)
    end = (forest.start[node] + own).astype(np.int64)
    if window is None:
        return end
    position = np.empty_like(end)
    position[forest.row_order] = forest.row_positions
    return end - np.maximum(0, position - window + 1)


def _bytes(
    plan: Plan, spec: AttentionSpec, tokens: int, rows: int, partials: int, words: int
) -> Bytes:
    heads, size = spec.num_q_heads, DTYPE_BYTES[spec.dtype]
    kv = {kind: tokens * each for kind, each in kv_bytes(spec).items()}
    return Bytes(
        **kv,
        q=rows * heads * spec.q_width * size,
        partials=partials,
        output=plan.num_rows * heads * (spec.v_width * size + 4),
        indices=words * INDEX_BYTES,
    )


def _words_a_page(spec: AttentionSpec, heads: int = 1) -> int:
    """Its number, and where they are cached in 8 bits the scales of K and V of so many heads."""
    return 1 + 2 * heads * bool(spec.scaled)


def _index_words(plan: Plan, spec: AttentionSpec) -> int:
    """Words of the plan's arrays that all units read, and those of stage 2."""
    run_pages = (plan.runs[:, Run.FIRST_SLOT] + _run_tokens(plan) - 1) // plan.page_size + 1
    before = np.append(0, run_pages.cumsum())
    first, last = plan.items[:, Item.RUN_BEGIN], plan.items[:, Item.RUN_END]
    rows = plan.items[:, Item.NUM_ROWS].astype(np.int64)
    pages = before[last] - before[first]
    a_row = 2 if plan.window is None else 3
    others = (last - first) * plan.runs.shape[1] + plan.items.shape[1] + a_row * rows
    words = plan.merge_rows.size + plan.merge_indptr.size
    for number, begin, end in plan.launches:
        heads = plan.tiles[number].heads
        a_unit = pages[begin:end] * _words_a_page(spec, heads) + others[begin:end]
        words += int(a_unit.sum()) * (spec.num_kv_heads // heads)
    return words


def _run_tokens(plan: Plan) -> Ints:
    """int[U], tokens of each run: up to where the next begins, or to the item's end."""
    end = np.empty(len(plan.runs), np.int64)
    end[:-1] = plan.runs[1:, Run.OFFSET]
    end[plan.items[:, Item.RUN_END] - 1] = plan.items[:, Item.NUM_TOKENS]
    return end - plan.runs[:, Run.OFFSET]


def _tile_pairs(plan: Plan) -> int:
    """(lane row, token) pairs that kernels compute under one KV head."""
    pairs = 0
    for index, begin, end in plan.launches:
        tile = plan.tiles[index]
        granule = plan.granules[index]
        rows = plan.items[begin:end, Item.NUM_ROWS].astype(np.int64)
        tokens = plan.items[begin:end, Item.NUM_TOKENS]
        lanes = -(-rows * plan.group // granule) * granule
        pairs += int(lanes @ -(-tokens // tile.kv_tile)) * tile.kv_tile
    return pairs

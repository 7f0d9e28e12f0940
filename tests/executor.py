"""A plan run by hand: float64, one token at a time, with a count of everything that it reads.

Walks the arrays as the kernels do, one unit (an item under as many KV heads as its tile class takes
at a time) after another, and shares no code with what lays them out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


@dataclass
class Execution:
    """What came out, and what it took, in elements: cache and q elements, index words, FLOPs.

    Attributes:
        out: float64[R, Hq, v_width], the caller's rows.
        lse: float64[R, Hq].
        reads: elements by kind, those of K only where they are not V's as well.
        pairs: how often each (caller's row, page, slot) was seen, under KV head 0.
    """

    out: np.ndarray
    lse: np.ndarray
    reads: Counter = field(default_factory=Counter)
    pairs: Counter = field(default_factory=Counter)


def execute(plan, spec, q, buffers) -> Execution:
    """Both stages, over q ``[R, Hq, width]`` and buffers ``[pages, page, heads, width]``."""
    shape = (plan.num_rows, spec.num_q_heads)
    done = Execution(np.full((*shape, spec.v_width), np.nan), np.full(shape, np.nan))
    partial_out = np.full((plan.num_partials, shape[1], spec.v_width), np.nan)
    partial_lse = np.full((plan.num_partials, shape[1]), np.nan)
    for tile, begin, end in plan.launches:
        for item in plan.items[begin:end].tolist():
            assert item[1] * spec.group <= plan.tiles[tile].lane_rows
            for head in range(spec.num_kv_heads):
                leads = head % plan.tiles[tile].heads == 0
                _unit(plan, spec, item, head, leads, q, buffers, (partial_out, partial_lse), done)
            steps = -(-item[4] // plan.tiles[tile].kv_tile)
            granule = plan.granules[tile]
            lanes = -(-item[1] * spec.group // granule) * granule
            pairs = steps * plan.tiles[tile].kv_tile * lanes
            done.reads["tile_flops"] += (
                2 * (spec.q_width + spec.v_width) * pairs * spec.num_kv_heads
            )
    _merge(plan, partial_out, partial_lse, done)
    return done


def _unit(plan, spec, item, head, leads, q, buffers, partials, done) -> None:
    """One item under one KV head; the first of a unit's heads reads the plan's arrays for all."""
    row_begin, num_rows, run_begin, run_end, num_tokens, dest_begin, last = item
    heads = slice(head * spec.group, (head + 1) * spec.group)
    indices = done.reads if leads else Counter()
    indices["indices"] += 7 + (2 if plan.window is None else 3) * num_rows
    if plan.window is not None:
        assert last == plan.row_positions[row_begin : row_begin + num_rows].max()
    done.reads["q"] += num_rows * spec.group * spec.q_width
    scores = {row: [] for row in range(row_begin, row_begin + num_rows)}
    for (page, slot), rows in _tokens(plan, run_begin, run_end, num_tokens, indices):
        key, value = _key_and_value(spec, buffers, page, slot, head, done.reads)
        assert np.isfinite(key).all(), "a slot that holds no token was read"
        for row in rows & scores.keys():
            caller = plan.row_order[row]
            scores[row].append((spec.scale * q[caller, heads] @ key, value))
            done.reads["flops"] += 2 * (key.size + value.size) * spec.group
            done.pairs[int(caller), page, slot] += head == 0
    for within, row in enumerate(scores):
        out, lse = _softmax(scores[row], spec)
        dest = int(plan.dests[dest_begin + within])
        if dest < 0:
            assert ~dest == plan.row_order[row]
            _store(done.out, done.lse, ~dest, heads, out, lse)
            done.reads["output"] += out.size
        else:
            _store(*partials, dest, heads, out, lse)
            done.reads["partials"] += out.size + lse.size


def _key_and_value(spec, buffers, page, slot, head, reads):
    """The key, its rope part last, and the value; a column that both have is read once, as V's."""
    k, v = spec.k, spec.v
    of_v = {(v.buffer, column) for column in range(v.begin, v.end)}
    of_k = {(k.buffer, column) for column in range(k.begin, k.end)}
    reads["v"] += len(of_v)
    reads["k"] += len(of_k - of_v)
    key, value = (buffers[x.buffer][page, slot, head, x.begin : x.end] for x in (k, v))
    if spec.rope is None:
        return key, value
    heads = buffers[spec.rope][page, slot]
    rope = heads[head if len(heads) > 1 else 0]
    reads["rope"] += rope.size if len(heads) > 1 or head == 0 else 0
    return np.concatenate([key, rope]), value


def _tokens(plan, run_begin, run_end, num_tokens, reads):
    """Each token of the item in order: its page and slot, and the rows that see it."""
    shift = int(plan.header[0])
    assert run_end - run_begin <= 1 << int(plan.header[1])
    offsets = [*plan.runs[run_begin:run_end, 0].tolist(), num_tokens]
    for run, (begin, end) in enumerate(pairwise(offsets), run_begin):
        assert begin < end
        _, page_begin, first_slot, row_begin, row_end, diagonal, position = plan.runs[run].tolist()
        assert first_slot < 1 << shift
        reads["indices"] += 7
        page_read = None
        for t in range(end - begin):
            entry, slot = divmod(first_slot + t, 1 << shift)
            reads["indices"] += entry != page_read
            page_read = entry
            page = int(plan.page_indices[page_begin + entry])
            rows = set(range(row_begin + max(0, t - diagonal), row_end))
            if plan.window is not None:
                near = plan.row_positions - (position + t) < plan.window
                rows &= set(np.flatnonzero(near).tolist())
            yield (page, slot), rows


def _softmax(scores, spec):
    if not scores:
        return np.zeros((spec.group, spec.v_width)), np.full(spec.group, -np.inf)
    logits = np.stack([logit for logit, _ in scores])
    weights = np.exp(logits - logits.max(axis=0))
    values = np.stack([value for _, value in scores])
    total = weights.sum(axis=0)
    return np.einsum("tg,tv->gv", weights / total, values), np.log(total) + logits.max(axis=0)


def _store(outs, lses, row, heads, out, lse) -> None:
    assert np.isnan(lses[row, heads]).all(), "written twice"
    outs[row, heads], lses[row, heads] = out, lse


def _merge(plan, partial_out, partial_lse, done) -> None:
    done.reads["indices"] += len(plan.merge_rows) + len(plan.merge_indptr)
    for k, row in enumerate(plan.merge_rows.tolist()):
        slots = slice(*plan.merge_indptr[k : k + 2].tolist())
        outs, lses = partial_out[slots], partial_lse[slots]
        done.reads["partials"] += outs.size + lses.size
        done.reads["output"] += done.out[row].size
        assert np.isnan(done.lse[row]).all(), "written twice"
        top = lses.max(axis=0, initial=-np.inf)
        weights = np.exp(lses - np.where(np.isfinite(top), top, 0))
        total = weights.sum(axis=0)
        with np.errstate(divide="ignore"):
            done.lse[row] = np.log(total) + top if len(lses) else -np.inf
        done.out[row] = (weights[..., None] * outs).sum(axis=0) / np.where(total, total, 1)[:, None]

"""A cascade: KV that rows share is read once for all of them, and the parts are merged by LSE.

That is what one can write with torch alone (Ye et al. 2024, "Cascade Inference"; Juravsky et al.
2024, arXiv 2402.05099). A part is a call of the kernel behind SDPA on CPUs, which returns the LSE
too. Only the gathering of KV is not counted; folding q, merging in float32, and placing rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as bind

import torch
from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.peer import Call, Peer, no_cap_and_no_sinks, on_cpus_alone, too_large
from deft_tvm.peers.pieces import Batch, Piece, batches, by_level, by_prefix

NOTHING_SEEN = -1e30
"""LSE of no tokens: finite, so that no difference of two is NaN."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Part:
    """One call and where its result goes; n are the rows of a piece.

    Attributes:
        q: [pieces, KV heads, n · group, width].
        k: [pieces, KV heads, tokens, width].
        v: the same shape.
        bias: [pieces, 1, n · group, tokens], 0 or -∞, or None.
        blind: bool[pieces, 1, n, 1], rows that see none of the tokens, or None where all see some.
        out: float32[pieces, KV heads, n, group, v_width], what these rows have found so far.
        lse: float32[pieces, KV heads, n, group].
        first: they have found nothing so far.
        last: they will not find more.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    blind: Tensor | None
    out: Tensor
    lse: Tensor
    first: bool
    last: bool

    def add(self, scale: float) -> None:
        """Read the tokens and merge what they give into `out` and `lse`."""
        out, lse = _flash(self.q, self.k, self.v, attn_mask=self.bias, scale=scale)
        out = out.unflatten(2, self.out.shape[2:4])[..., : self.out.shape[-1]]
        lse = lse.unflatten(2, self.lse.shape[2:])
        if self.blind is not None:  # the kernel says 0, as if the one weight were 1
            lse = lse.masked_fill(self.blind, NOTHING_SEEN)
        if self.first:
            self.out.copy_(out)
            self.lse.copy_(lse)
            return
        share = torch.sigmoid(lse - self.lse).unsqueeze(-1)
        self.out.lerp_(out.float(), share)
        if not self.last:
            torch.logaddexp(self.lse, lse, out=self.lse)


def cascade(gathered: Gathered, cut: Callable[[Gathered], list[Piece]]) -> Call:
    """Calls over the pieces that `cut` finds, merged. Every call returns the same tensor."""
    spec, order = gathered.case.spec, gathered.order
    heads, rows = (spec.num_kv_heads, spec.group), len(gathered.q)
    folded = torch.empty_like(gathered.folded)
    heads_first = folded.unflatten(1, (rows, spec.group))
    out = torch.zeros(rows, *heads, spec.v_width)
    lse = torch.zeros(rows, *heads)
    parts = _parts(gathered, batches(gathered, cut(gathered)), folded, out, lse)
    q = gathered.q if order is None else torch.empty_like(gathered.q)
    rounded = out if out.dtype == q.dtype else out.to(q.dtype)
    placed = rounded if order is None else torch.empty_like(rounded)
    place = None if order is None else order.argsort()

    def call() -> Tensor:
        if order is not None:
            torch.index_select(gathered.q, 0, order, out=q)
        heads_first.copy_(q.unflatten(1, heads).transpose(0, 1))
        for part in parts:
            part.add(spec.scale)
        if rounded is not out:
            rounded.copy_(out)
        if place is not None:
            torch.index_select(rounded, 0, place, out=placed)
        return placed.flatten(1, 2)

    return call


def _parts(
    gathered: Gathered, made: Sequence[Batch], folded: Tensor, out: Tensor, lse: Tensor
) -> list[Part]:
    group, open_rows, parts = gathered.case.spec.group, torch.zeros(len(out)).bool(), []
    for batch in reversed(made):
        k, v = gathered.read(batch.tokens)
        rows = _rows(batch, torch.arange(len(out)))
        blind = None if batch.seen is None else ~batch.seen.any(2)
        parts.append(
            Part(
                q=batch.lanes(folded, group),
                k=k,
                v=v,
                bias=batch.bias(group, folded.dtype),
                blind=blind[:, None, :, None] if blind is not None and blind.any() else None,
                out=_rows(batch, out).transpose(1, 2),
                lse=_rows(batch, lse).transpose(1, 2),
                first=batch.first,
                last=not open_rows[rows].any(),
            )
        )
        open_rows[rows] = True
    return parts[::-1]


def _rows(batch: Batch, x: Tensor) -> Tensor:
    """Of [all rows, ...] the view [pieces, rows, ...]."""
    of_row, *others = x.stride()
    shape = (len(batch.tokens), batch.rows, *x.shape[1:])
    return x[batch.begin :].as_strided(shape, (batch.step * of_row, of_row, *others))


def _lacks(gathered: Gathered) -> str | None:
    return (
        on_cpus_alone(gathered)
        or no_cap_and_no_sinks(gathered)
        or too_large("masks may take", gathered.mask_bytes)
    )


def _ordered(_: Gathered, out: Tensor) -> Tensor:
    return out


CASCADE = {
    "cascade": Peer(
        bind(cascade, cut=by_level),
        "SDPA's kernel for each node or subtree, whichever is cheaper, merged by LSE",
        _lacks,
        _ordered,
    ),
    "cascade_masked": Peer(
        bind(cascade, cut=by_prefix),
        "SDPA's kernel for what all rows of a tree see, masked for the rest, merged by LSE",
        _lacks,
        _ordered,
    ),
}

"""Tree attention as ``scaled_dot_product_attention`` can compute it, each way at its best.

SDPA knows no trees. What it needs is gathered beforehand and not counted: a copy of its path for
every row, or all tokens back to back; masks are additive and of q's type; no call moves its output
to another place. What is cached in 8 bits has q's type again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from functools import partial as bind

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_tvm.fp8 import dequantize
from deft_tvm.reference import dense_mask
from deft_tvm.workloads import Case


@dataclass(frozen=True)
class Sequences:
    """Rows whose paths are equally long, each with its own copy of its path.

    Attributes:
        rows: int64[B], the caller's numbers.
        q: [B, query heads, q_width].
        k: [B, KV heads, tokens, q_width].
        v: [B, KV heads, tokens, v_width].
    """

    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def calls(self, *, fold: bool, batch: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """q, K and V of SDPA calls, one for all rows or one each; the group as rows or heads."""
        q = self.q.unflatten(1, (self.k.shape[1], -1)) if fold else self.q.unsqueeze(2)
        size = len(q) if batch else 1
        yield from zip(q.split(size), self.k.split(size), self.v.split(size), strict=True)


class Gathered:
    """A case without pages and trees, as SDPA takes it."""

    def __init__(self, case: Case) -> None:
        forest, spec = case.forest, case.spec
        self.case = case
        self.mask = dense_mask(
            forest.parents.tolist(),
            forest.lengths.tolist(),
            forest.rows.tolist(),
            forest.bidirectional.astype(bool).tolist(),
            spec.window,
        )
        tokens = [
            _by_token(case, buffer if scale is None else _wide(case, buffer, scale))
            for buffer, scale in zip(case.buffers, case.scale_of, strict=True)
        ]
        keys = tokens[spec.k.buffer][..., spec.k.begin : spec.k.end]
        if spec.rope is not None:
            keys = torch.cat([keys, tokens[spec.rope].expand(-1, spec.num_kv_heads, -1)], dim=-1)
        self.k = keys.transpose(0, 1).contiguous()
        self.v = tokens[spec.v.buffer][..., spec.v.begin : spec.v.end].transpose(0, 1).contiguous()

    @property
    def sequence_bytes(self) -> int:
        """Of K and V when every row has a copy of its path."""
        per_token = (self.k[:, :1].numel() + self.v[:, :1].numel()) * self.k.element_size()
        return int(self.mask.sum()) * per_token

    @cached_property
    def sequences(self) -> list[Sequences]:
        """The rows by the length of their paths; rows that see nothing are left out."""
        lengths = self.mask.sum(1)
        return [self._of_length(int(n)) for n in lengths.unique() if n]

    def _of_length(self, tokens: int) -> Sequences:
        rows = torch.nonzero(self.mask.sum(1) == tokens).squeeze(1)
        path = self.mask[rows].nonzero()[:, 1].view(len(rows), tokens)
        k, v = (x[:, path].transpose(0, 1).contiguous() for x in (self.k, self.v))
        return Sequences(rows, self.case.q[rows], k, v)

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """[rows, query heads, v_width] from what calls over `sequences` return."""
        found = torch.cat(parts)
        out = found.new_zeros(len(self.mask), *found.shape[1:])
        out[torch.cat([s.rows for s in self.sequences])] = found
        return out


Call = Callable[[], list[Tensor]]


def by_sequence(gathered: Gathered, *, fold: bool = False, batch: bool = False) -> Call:
    """A call for each row, or with `batch` for all rows with paths of one length.

    With `fold` the query heads of a group are rows over their KV head, which is read once.
    """
    calls = [call for s in gathered.sequences for call in s.calls(fold=fold, batch=batch)]
    scale = gathered.case.spec.scale
    return lambda: [
        F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=not fold).flatten(1, 2)
        for q, k, v in calls
    ]


def masked(gathered: Gathered) -> Call:
    """One call over all tokens, the tree as a mask."""
    q = gathered.case.q.transpose(0, 1).unsqueeze(0)
    bias = torch.zeros(gathered.mask.shape, dtype=q.dtype).masked_fill_(~gathered.mask, -torch.inf)
    k, v = gathered.k.unsqueeze(0), gathered.v.unsqueeze(0)
    scale = gathered.case.spec.scale

    def call() -> list[Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        return [out.squeeze(0).transpose(0, 1)]

    return call


@dataclass(frozen=True)
class Peer:
    """One way to compute tree attention with SDPA.

    Attributes:
        make: prepares a case and returns the call to time.
        copies: every row has a copy of its path.
    """

    make: Callable[[Gathered], Call]
    copies: bool


PEERS = {
    "sequences": Peer(by_sequence, copies=True),
    "folded": Peer(bind(by_sequence, fold=True), copies=True),
    "batched": Peer(bind(by_sequence, fold=True, batch=True), copies=True),
    "masked": Peer(masked, copies=False),
}
"""SDPA sequence by sequence; with the group folded into rows; with sequences of one length in one
call as well; in one call over the flattened tree."""


def _wide(case: Case, buffer: Tensor, scales: Tensor) -> Tensor:
    """A cache in 8 bits as SDPA can read it."""
    return dequantize(buffer, scales, layout=case.spec.layout).to(case.q.dtype)


def _by_token(case: Case, buffer: Tensor) -> Tensor:
    """[tokens, heads, width] of a cache tensor, nodes back to back in the caller's order."""
    if case.pages.is_contiguous:
        return buffer
    table, forest = case.pages, case.forest
    node = torch.arange(forest.num_nodes).repeat_interleave(torch.from_numpy(forest.lengths.copy()))
    before = torch.from_numpy(forest.lengths.cumsum() - forest.lengths)
    indices, indptr, first = (
        torch.from_numpy(x.copy()).long()
        for x in (table.page_indices, table.page_indptr, table.first_slot)
    )
    x = first[node] + torch.arange(len(node)) - before[node]
    page = indices[indptr[node] + x // table.page_size]
    in_page = buffer if case.spec.layout == "NHD" else buffer.transpose(1, 2)
    return in_page[page, x % table.page_size]

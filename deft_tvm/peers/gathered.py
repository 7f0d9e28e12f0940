"""What peers read, gathered beforehand: KV without pages, in q's type, and as wide as q.

SDPA's fast kernel takes q, K and V of one width only; other widths go through products over whole
matrices, ten times slower where MLA reads 576 and 512 columns. So the narrower ones get columns of
zeros, which change no product. Where V is the first columns of K, as in MLA, K itself is taken for
V. Either way the first `v_width` columns of what comes out are the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_tvm.fp8 import dequantize
from deft_tvm.reference import dense_mask
from deft_tvm.workloads import Case
from deft_tvm.workloads.tensors import token_places


@dataclass(frozen=True)
class Sequences:
    """Rows whose paths are equally long, each with its own copy of its path.

    Attributes:
        rows: int64[B], the caller's numbers.
        q: [B, query heads, width].
        k: [B, KV heads, tokens, width].
        v: the same shape; `k` itself where V is the first columns of K.
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
    """A case without pages and trees, as SDPA takes it.

    Attributes:
        case: what it was gathered from.
        mask: bool[rows, tokens], in the caller's order, nodes back to back.
        q: [rows, query heads, width], width the larger one of q_width and v_width.
        k: [KV heads, tokens, width].
        v: the same shape; `k` itself where V is the first columns of K.
    """

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
        width = max(spec.q_width, spec.v_width)
        self.q = _padded(case.q, width)
        self.k = _padded(keys.transpose(0, 1), width)
        if spec.v == spec.k:
            self.v = self.k
        else:
            values = tokens[spec.v.buffer][..., spec.v.begin : spec.v.end]
            self.v = _padded(values.transpose(0, 1), width)

    @cached_property
    def order(self) -> Tensor | None:
        """int64[rows], the caller's number of each row in depth-first order; None where every row
        has the same number in both."""
        order = torch.from_numpy(self.case.forest.row_order.copy()).long()
        return None if torch.equal(order, torch.arange(len(order))) else order

    def depth_first(self, x: Tensor) -> Tensor:
        """[rows, ...] in depth-first order, of the caller's order."""
        return x if self.order is None else x[self.order]

    def callers(self, x: Tensor) -> Tensor:
        """[rows, ...] in the caller's order, of depth-first order."""
        if self.order is None:
            return x
        return torch.empty_like(x).index_copy_(0, self.order.to(x.device), x)

    @cached_property
    def seen(self) -> Tensor:
        """`mask` with rows in depth-first order."""
        return self.depth_first(self.mask)

    @cached_property
    def folded(self) -> Tensor:
        """[KV heads, rows · group, width], q in depth-first order, heads of a group as rows."""
        q = self.depth_first(self.q).unflatten(1, (self.k.shape[0], -1))
        return q.transpose(0, 1).flatten(1, 2).contiguous()

    def unfolded(self, out: Tensor) -> Tensor:
        """[rows, query heads, v_width] in the caller's order, of rows as `folded` has them."""
        spec = self.case.spec
        x = out.unflatten(1, (-1, spec.group)).transpose(0, 1).flatten(1, 2)
        return self.callers(x[..., : spec.v_width])

    @property
    def mask_bytes(self) -> int:
        """Of a mask of q's type, as many times as large as the group."""
        return self.mask.numel() * self.case.spec.group * self.q.element_size()

    @property
    def sequence_bytes(self) -> int:
        """Of K and V when every row has a copy of its path."""
        per_token = self.k[:, :1].numel() * self.k.element_size()
        return int(self.mask.sum()) * per_token * (1 if self.v is self.k else 2)

    @cached_property
    def sequences(self) -> list[Sequences]:
        """The rows by the length of their paths; rows that see nothing are left out."""
        lengths = self.mask.sum(1)
        return [self._of_length(int(n)) for n in lengths.unique() if n]

    def _of_length(self, tokens: int) -> Sequences:
        rows = torch.nonzero(self.mask.sum(1) == tokens).squeeze(1)
        path = self.mask[rows].nonzero()[:, 1].view(len(rows), tokens)
        k, v = self.read(path)
        return Sequences(rows, self.q[rows], k, v)

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """[rows, query heads, v_width] from [B, query heads, width] of the calls of `sequences`."""
        found = torch.cat(parts)[..., : self.case.spec.v_width]
        out = found.new_zeros(len(self.mask), *found.shape[1:])
        out[torch.cat([s.rows for s in self.sequences])] = found
        return out

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, each [B, KV heads, n, width], of tokens int64[B, n]; one tensor where they are
        one here."""
        k = self.k[:, tokens].transpose(0, 1).contiguous()
        return k, k if self.v is self.k else self.v[:, tokens].transpose(0, 1).contiguous()


def _padded(x: Tensor, width: int) -> Tensor:
    """With columns of zeros behind its own."""
    return F.pad(x, (0, width - x.shape[-1])).contiguous()


def _wide(case: Case, buffer: Tensor, scales: Tensor) -> Tensor:
    """A cache in 8 bits as torch can read it."""
    return dequantize(buffer, scales, layout=case.spec.layout).to(case.q.dtype)


def _by_token(case: Case, buffer: Tensor) -> Tensor:
    """[tokens, heads, width] of a cache tensor, nodes back to back in the caller's order."""
    if case.pages.is_contiguous:
        return buffer
    in_page = buffer if case.spec.layout == "NHD" else buffer.transpose(1, 2)
    return in_page[token_places(case.forest, case.pages)]

"""What FlashInfer 0.5.3 computes over pages, in torch: its classes with the arguments we give them.

Rules of its kernels are held by assertions: integers are int32, no request is empty, every row is
in one request, and pages are full but for the last of each request.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Caches = tuple[Tensor, Tensor]


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:
        check_workspace(float_workspace_buffer, kv_layout)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
    ) -> None:
        rows = torch.arange(len(indptr), dtype=torch.int32)
        pages = (indptr, indices, lengths_of(indptr, last_page_len, page_size))
        self.call = Requests(rows, *pages, page_size, sm_scale, logits_soft_cap)
        self.heads = (num_qo_heads, num_kv_heads, head_dim)

    def run(self, q: Tensor, paged_kv_cache: Caches, *, out: Tensor) -> Tensor:
        check_heads(q, paged_kv_cache, self.heads)
        return self.call.run(q, *paged_kv_cache, out, None)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        check_workspace(float_workspace_buffer, kv_layout)
        assert backend in ("auto", "fa2", "fa3")
        self.backend = backend

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert custom_mask is None or self.backend == "fa2"
        lengths = lengths_of(paged_kv_indptr, paged_kv_last_page_len, page_size)
        pages = (paged_kv_indptr, paged_kv_indices, lengths)
        self.call = Requests(qo_indptr, *pages, page_size, sm_scale, logits_soft_cap, custom_mask)
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Caches,
        *,
        out: Tensor,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        check_heads(q, paged_kv_cache, self.heads)
        assert return_lse == (lse is not None)
        self.call.run(q, *paged_kv_cache, out, lse)
        return (out, lse) if return_lse else out


class BatchMLAPagedAttentionWrapper:
    def __init__(self, float_workspace_buffer: Tensor, *, backend: str = "auto") -> None:
        check_workspace(float_workspace_buffer, "NHD")
        assert backend in ("auto", "fa2", "fa3")

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert not causal
        self.call = Requests(qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size, sm_scale)
        self.sizes = (num_heads, head_dim_ckv, head_dim_kpe, page_size)

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        assert all(x.is_contiguous() for x in (q_nope, q_pe, ckv_cache, kpe_cache, out))
        heads, ckv, kpe, page = self.sizes
        assert q_nope.shape[1:] == (heads, ckv)
        assert q_pe.shape[1:] == (heads, kpe)
        assert ckv_cache.shape[1:] == (page, ckv)
        assert kpe_cache.shape[1:] == (page, kpe)
        assert return_lse == (lse is not None)
        keys = torch.cat([ckv_cache, kpe_cache], -1).unsqueeze(2)
        self.call.run(torch.cat([q_nope, q_pe], -1), keys, ckv_cache.unsqueeze(2), out, lse)
        return (out, lse) if return_lse else out


def merge_state_in_place(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    """LSE has the base 2. A row that is not in `mask` keeps what it has."""
    assert s.dtype == s_other.dtype == torch.float32
    total = torch.logaddexp2(s, s_other)
    share = torch.exp2(s_other - total).unsqueeze(-1)
    merged = v.double() * (1 - share.double()) + v_other.double() * share.double()
    rows = torch.ones(len(v), dtype=torch.bool) if mask is None else mask
    assert rows.shape == (len(v),)
    v[rows], s[rows] = merged.to(v.dtype)[rows], total[rows]


class Requests:
    """Rows [row_indptr[i], row_indptr[i + 1]) over the first lengths[i] slots of their pages."""

    def __init__(
        self,
        row_indptr: Tensor,
        page_indptr: Tensor,
        indices: Tensor,
        lengths: Tensor,
        page_size: int,
        scale: float | None,
        soft_cap: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        for integers in (row_indptr, page_indptr, indices, lengths):
            assert integers.dtype == torch.int32
            assert integers.dim() == 1
            assert integers.is_contiguous()
        assert len(row_indptr) == len(page_indptr) == len(lengths) + 1
        assert row_indptr[0] == page_indptr[0] == 0
        assert (row_indptr.diff() > 0).all()
        assert (lengths > 0).all()
        assert torch.equal(page_indptr.diff(), (lengths + page_size - 1) // page_size)
        assert page_indptr[-1] == len(indices)
        assert scale is not None
        self.rows, self.pages, self.indices = row_indptr.tolist(), page_indptr.tolist(), indices
        self.lengths, self.scale, self.cap = lengths.tolist(), scale, soft_cap
        sizes = [r * n for r, n in zip(row_indptr.diff().tolist(), self.lengths, strict=True)]
        assert mask is None or mask.shape == (sum(sizes),)
        self.masks = [None] * len(sizes) if mask is None else mask.split(sizes)

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> Tensor:
        """q [rows, query heads, width], k and v [pages, page size, KV heads, width]."""
        assert self.rows[-1] == len(q) == len(out)
        out.fill_(torch.nan)
        for i, (length, mask) in enumerate(zip(self.lengths, self.masks, strict=True)):
            rows = slice(self.rows[i], self.rows[i + 1])
            pages = self.indices[self.pages[i] : self.pages[i + 1]].long()
            keys, values = (x[pages].flatten(0, 1)[:length].double() for x in (k, v))
            group = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            logits = self.scale * torch.einsum("rhd,thd->hrt", q[rows].double(), keys)
            if self.cap is not None:
                logits = self.cap * torch.tanh(logits / self.cap)
            if mask is not None:
                logits = logits.masked_fill(~mask.view(-1, length), -torch.inf)
            found = torch.einsum("hrt,thd->rhd", logits.softmax(-1), values)
            out[rows] = found.to(out.dtype)
            if lse is not None:
                lse[rows] = (logits.logsumexp(-1).T / math.log(2)).float()
        return out


def lengths_of(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    assert (last_page_len >= 1).all()
    assert (last_page_len <= page_size).all()
    return (indptr.diff() - 1).clamp(min=0) * page_size + last_page_len


def check_workspace(workspace: Tensor, layout: str) -> None:
    assert workspace.dtype == torch.uint8
    assert workspace.numel() >= 128 << 20
    assert layout == "NHD"


def check_heads(q: Tensor, caches: Caches, heads: tuple[int, int, int]) -> None:
    """Sizes are those that were planned for; kernels assume that elements lie side by side."""
    q_heads, kv_heads, width = heads
    assert q.shape[1:] == (q_heads, width)
    assert all(x.shape[2:] == (kv_heads, width) for x in caches)
    assert all(x.is_contiguous() for x in (q, *caches))

"""Random tensors for a forest: queries, a cache in shuffled pages, and the page table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deft_tvm.arrays import consecutive
from deft_tvm.fp8 import quantize
from deft_tvm.pages import PageTable
from deft_tvm.reference import Exact, tree_attention
from deft_tvm.spec import AttentionSpec, CacheBuffer
from deft_tvm.tree import Forest

SPARE_PAGES = 4
"""Pages of every cache that no node owns."""


@dataclass(frozen=True)
class Case:
    """All that one run of attention takes.

    Attributes:
        spec: the attention.
        forest: the trees.
        pages: where the cache has the forest's tokens.
        q: [rows, query heads, q_width] in the spec's dtype.
        buffers: the cache in the order of ``spec.buffers``, each [pages, page_size, heads, width]
            (HND: [pages, heads, page_size, width]; contiguous: [tokens, heads, width]). Slots
            that hold no token are NaN.
        scales: of those buffers that have any, each float32[heads] or float32[pages, heads].
        sinks: float32[query heads], where the spec has sinks.
    """

    spec: AttentionSpec
    forest: Forest
    pages: PageTable
    q: Tensor
    buffers: tuple[Tensor, ...]
    scales: tuple[Tensor, ...] = ()
    sinks: Tensor | None = None

    @classmethod
    def of_layer(
        cls,
        spec: AttentionSpec,
        forest: Forest,
        pages: PageTable,
        q: Tensor,
        layer: Sequence[Tensor],
    ) -> Case:
        """With the layer's tensors as `layer` has them."""
        caches, scales = len(spec.buffers), len(spec.scaled)
        buffers, rest = tuple(layer[:caches]), tuple(layer[caches:])
        sinks = rest[-1] if spec.sinks else None
        return cls(spec, forest, pages, q, buffers, rest[:scales], sinks)

    @property
    def kv(self) -> tuple[Tensor, ...]:
        """What ``TreeAttention.run`` takes as the layer's cache."""
        return (*self.buffers, *self.scales)

    @property
    def layer(self) -> tuple[Tensor, ...]:
        """All tensors of the layer beside q, as `AttentionSpec.operands` numbers them."""
        return self.kv if self.sinks is None else (*self.kv, self.sinks)

    @property
    def scale_of(self) -> tuple[Tensor | None, ...]:
        """For each buffer its scales, None for a buffer without."""
        given = iter(self.scales)
        return tuple(next(given) if buffer.scaled else None for buffer in self.spec.buffers)

    def to(self, device: torch.device | str) -> Case:
        """The same numbers on a device."""
        return replace(
            self,
            q=self.q.to(device),
            buffers=tuple(buffer.to(device) for buffer in self.buffers),
            scales=tuple(scales.to(device) for scales in self.scales),
            sinks=None if self.sinks is None else self.sinks.to(device),
        )

    def reference(self) -> Exact:
        """The oracle's answer in float64."""
        spec, forest, pages = self.spec, self.forest, self.pages
        paged = not pages.is_contiguous
        return tree_attention(
            self.q,
            self.buffers,
            forest.parents.tolist(),
            forest.lengths.tolist(),
            forest.rows.tolist(),
            pages.page_indices.tolist() if paged else None,
            pages.page_indptr.tolist() if paged else None,
            pages.first_slot.tolist() if paged else None,
            page_size=spec.page_size,
            layout=spec.layout,
            num_kv_heads=spec.num_kv_heads,
            k=(spec.k.buffer, spec.k.begin, spec.k.end),
            v=(spec.v.buffer, spec.v.begin, spec.v.end),
            rope=spec.rope,
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            bidirectional=forest.bidirectional.astype(bool).tolist(),
            window=spec.window,
            scales=self.scale_of,
            sinks=self.sinks,
        )


def tensors(
    forest: Forest,
    spec: AttentionSpec,
    seed: int = 0,
    *,
    contiguous: bool = False,
    max_logit: float | None = None,
    scales: Literal["head", "page"] = "page",
    device: torch.device | str = "cpu",
) -> Case:
    """Normally distributed q, K and V in a cache that looks used.

    Pages are shuffled, some belong to nobody, and a node shorter than a page goes on in the page
    of the node before it, as the tokens of a draft do.

    Args:
        forest: the trees.
        spec: the attention.
        seed: another one, other numbers and another order of pages.
        contiguous: a cache without pages, nodes back to back in the caller's order.
        max_logit: scale q so that logits reach about ± this; by default they are about ± 5.
        scales: whether 8-bit caches have a scale for each head, or each page and head.
        device: where they are made, and then are; on another one they are other numbers.
    """
    random = torch.Generator(device).manual_seed(seed)
    pages = PageTable.contiguous(forest) if contiguous else shuffled_pages(forest, spec, seed)
    q = _normal(random, forest.num_rows, spec.num_q_heads, spec.q_width)
    if max_logit is not None:
        # Logits of unit-normal q and k have the deviation scale · √width, and the largest of a
        # hundred thousand are some five deviations out.
        q *= max_logit / (5 * spec.scale * spec.q_width**0.5)
    buffers: list[Tensor] = []
    of_buffers: list[Tensor] = []
    for buffer in spec.buffers:
        values = _buffer(buffer, spec, forest, pages, random)
        if buffer.scaled:
            by_page = scales == "page" and not contiguous
            values, scale = quantize(values, layout=spec.layout, by_page=by_page)
            of_buffers.append(scale)
        buffers.append(values.to(getattr(torch, buffer.dtype)))
    sinks = _normal(random, spec.num_q_heads) if spec.sinks else None
    q = q.to(getattr(torch, spec.dtype))
    return Case(spec, forest, pages, q, tuple(buffers), tuple(of_buffers), sinks)


def shuffled_pages(forest: Forest, spec: AttentionSpec, seed: int = 0) -> PageTable:
    """A page table in random order: a whole page or more begins a page, less shares one."""
    size, end = spec.page_size, 0
    first = np.zeros(forest.num_nodes, np.int64)
    for node, length in enumerate(forest.lengths.tolist()):
        first[node] = end if length < size else -(-end // size) * size
        end = first[node] + length
    begin = first // size
    count = -(-(first + forest.lengths) // size) - begin
    count[forest.lengths == 0] = 0
    used = -(-int(end) // size)
    order = np.random.default_rng(seed).permutation(used + SPARE_PAGES)
    indptr = np.append(0, count.cumsum())
    return PageTable(order[consecutive(begin, count)], indptr, first % size, page_size=size)


def token_places(forest: Forest, pages: PageTable) -> tuple[Tensor, Tensor]:
    """int64[tokens] twice: page and slot of every token, node by node."""
    node = np.repeat(np.arange(forest.num_nodes), forest.lengths)
    x = consecutive(pages.first_slot, forest.lengths)
    page = pages.page_indices[pages.page_indptr[node] + x // pages.page_size]
    return torch.from_numpy(page).long(), torch.from_numpy(x % pages.page_size).long()


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    """float32, on the generator's device."""
    return torch.randn(shape, generator=random, device=random.device)


def _buffer(
    buffer: CacheBuffer,
    spec: AttentionSpec,
    forest: Forest,
    pages: PageTable,
    random: torch.Generator,
) -> Tensor:
    """float32, not yet rounded to the buffer's type."""
    tokens = _normal(random, forest.num_tokens, buffer.heads, buffer.width)
    if pages.is_contiguous:
        return tokens
    shape = (pages.max_page + 1, spec.page_size, buffer.heads, buffer.width)
    cache = tokens.new_full(shape, torch.nan)
    cache[token_places(forest, pages)] = tokens
    return cache.transpose(1, 2).contiguous() if spec.layout == "HND" else cache

"""Decode all branches of a prompt at once, and each for itself: the same logits twice.

As a tree, every branch is a node under the prompt's node. First the branches' known tokens are
read in one step of many rows a node, then each branch writes a token a step. For itself, every
branch is one sequence through ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_tvm.demo.model import Transformer
from deft_tvm.demo.text import FewShot
from deft_tvm.pages import PageTable
from deft_tvm.pytorch import TreeAttention
from deft_tvm.reference import Exact
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case

DECODE_STEPS = 8
"""Tokens at the end of each branch that are written a step at a time."""

PROMPT = 0
"""The prompt's node; branch b is node b + 1."""


class Cache:
    """K and V of every layer in pages, in random order, as a pool in use hands them out.

    Attributes:
        pages: the pages of each node, enough for all its tokens.
        layers: K and V of each layer, ``[pages, page_size, heads, width]``.
    """

    def __init__(self, spec: AttentionSpec, layers: int, tokens: Sequence[int]) -> None:
        counts = [-(-count // spec.page_size) for count in tokens]
        total = sum(counts)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        ends = torch.tensor([0, *counts]).cumsum(0)
        self.pages = PageTable(order.numpy(), ends.numpy(), page_size=spec.page_size)
        shape = (total, spec.page_size, spec.num_kv_heads, spec.k_width)
        dtype = getattr(torch, spec.dtype)
        self.layers = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            for _ in range(layers)
        ]

    def slots(self, node: int, begin: int, end: int) -> Tensor:
        """int64[end - begin], where tokens [begin, end) of `node` lie, counted through all pages."""
        table = self.pages
        own = torch.from_numpy(table.page_indices[table.page_indptr[node] :].copy()).long()
        token = torch.arange(begin, end)
        return own[token // table.page_size] * table.page_size + token % table.page_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for buffer, new in zip(self.layers[layer], (k, v), strict=True):
            buffer.view(-1, *buffer.shape[2:])[slots] = new

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[tokens, heads, width]``, gathered."""
        k, v = (buffer.view(-1, *buffer.shape[2:])[slots] for buffer in self.layers[layer])
        return k, v


@dataclass(frozen=True)
class Decoded:
    """What decoding as a tree left behind.

    Attributes:
        logits: of each branch, ``[tokens, vocabulary]``.
        cases: of each layer the attention of the last step: its queries, its cache, its forest.
    """

    logits: list[Tensor]
    cases: list[Case]


def prefill(model: Transformer, text: FewShot, spec: AttentionSpec) -> Cache:
    """The cache after the prompt, with room for all branches."""
    cache = Cache(spec, model.shape.layers, [len(text.prompt), *text.lengths])
    slots = cache.slots(PROMPT, 0, len(text.prompt))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, slots, k, v)
        return _sdpa(q, k, v, is_causal=True)

    model(text.prompt, torch.arange(len(text.prompt)), attend)
    return cache


def decode(
    model: Transformer, text: FewShot, cache: Cache, attention: TreeAttention
) -> Decoded:
    """Run all branches as one tree: what is known of them at once, then `DECODE_STEPS` steps."""
    rows, queries = [n - DECODE_STEPS for n in text.lengths], {}
    pages, parts = cache.pages, []
    for step in range(DECODE_STEPS + 1):
        ends = [n - DECODE_STEPS + step for n in text.lengths]
        begins = [end - count for end, count in zip(ends, rows, strict=True)]
        lengths = [len(text.prompt), *ends]
        if step < 2:  # the second step has other rows than the first, the later ones only grow
            parents = [-1] + [PROMPT] * len(ends)
            forest = Forest.from_parents(parents, lengths, [0, *rows])
            attention.plan(forest, pages.page_indices, pages.page_indptr)
        else:
            forest = forest.with_lengths(lengths)
            attention.update(forest)
        spans = list(zip(text.branches, begins, ends, strict=True))
        tokens = torch.cat([branch[begin:end] for branch, begin, end in spans])
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in spans])
        slots = torch.cat([cache.slots(b + 1, *span[1:]) for b, span in enumerate(spans)])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor = slots) -> Tensor:
            cache.write(layer, slots, k, v)
            queries[layer] = q
            return attention.run(q, cache.layers[layer])[0]

        parts.append(model(tokens, positions + len(text.prompt), attend).split(rows))
        rows = [1] * len(rows)
    cases = [
        Case(attention.spec, forest, pages, queries[layer], buffers)
        for layer, buffers in enumerate(cache.layers)
    ]
    return Decoded([torch.cat(of_branch) for of_branch in zip(*parts, strict=True)], cases)

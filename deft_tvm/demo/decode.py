"""Decode all branches of a prompt as one tree, and each for itself: the same logits twice.

As a tree, every branch is a node under the prompt's node. First what is known of the branches is
read, many rows a node, then each branch writes a token a step. For itself, every branch is one
sequence through ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_tvm.demo.model import Transformer
from deft_tvm.demo.text import FewShot
from deft_tvm.pages import PageTable
from deft_tvm.reference import Exact
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case

if TYPE_CHECKING:
    from deft_tvm.pytorch import TreeAttention

DECODE_STEPS = 8
"""Tokens at the end of each branch that are written a step at a time."""

PROMPT = 0
"""The prompt's node; branch b is node b + 1."""


class Cache:
    """K and V of every layer in pages, in random order, as a pool in use hands them out.

    Attributes:
        pages: the pages of each node, enough for all its tokens.
        layers: K and V of each layer, ``[pages, page_size, heads, width]``.
        prompt: slots of the prompt's tokens.
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
        self.prompt = self.slots(PROMPT, 0, tokens[PROMPT])

    def slots(self, node: int, begin: int, end: int) -> Tensor:
        """int64[end - begin], where tokens of `node` lie, counted through all pages."""
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


Nudge = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From an attention's output and its q, K and V to another output."""


def prefill(model: Transformer, text: FewShot, spec: AttentionSpec) -> Cache:
    """The cache after the prompt, with room for all branches."""
    cache = Cache(spec, model.shape.layers, [len(text.prompt), *text.lengths])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, cache.prompt, k, v)
        return _sdpa(q, k, v, is_causal=True)

    model(text.prompt, torch.arange(len(text.prompt)), attend)
    return cache


def decode_tree(
    model: Transformer, text: FewShot, cache: Cache, attention: TreeAttention
) -> Decoded:
    """All branches at once, their last `DECODE_STEPS` tokens a step at a time."""
    known = [length - DECODE_STEPS for length in text.lengths]
    ends = [[n + step for n in known] for step in range(DECODE_STEPS + 1)]
    forest: Forest | None = None
    queries: dict[int, Tensor] = {}
    parts = []
    for begin, end in pairwise([[0] * len(known), *ends]):
        forest = _plan(attention, cache, forest, _forest(text, begin, end))
        spans = list(enumerate(zip(begin, end, strict=True)))
        slots = torch.cat([cache.slots(b + 1, *span) for b, span in spans])
        tokens = torch.cat([text.branches[b][slice(*span)] for b, span in spans])
        places = torch.cat([torch.arange(*span) for _, span in spans])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor = slots) -> Tensor:
            cache.write(layer, slots, k, v)
            queries[layer] = q
            return attention.run(q, cache.layers[layer])[0]

        logits = model(tokens, len(text.prompt) + places, attend)
        parts.append(logits.split([last - first for _, (first, last) in spans]))
    assert forest is not None
    by_branch = [torch.cat(steps) for steps in zip(*parts, strict=True)]
    layers = enumerate(cache.layers)
    cases = [Case(attention.spec, forest, cache.pages, queries[i], kv) for i, kv in layers]
    return Decoded(by_branch, cases)


def decode_each(
    model: Transformer,
    branches: Sequence[Tensor],
    cache: Cache,
    nudge: Nudge = lambda out, *_: out,
) -> list[Tensor]:
    """Logits of each branch by itself, through SDPA over its whole sequence.

    Args:
        model: the same as for `decode_tree`.
        branches: tokens of each.
        cache: of which the prompt's part is read.
        nudge: applied to the output of every attention.
    """
    slots = cache.prompt
    prompt = [cache.read(layer, slots) for layer in range(len(cache.layers))]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.cat(parts) for parts in zip(prompt[layer], (k, v), strict=True))
        seen = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(slots))
        return nudge(_sdpa(q, keys, values, mask=seen), q, keys, values)

    return [model(branch, torch.arange(len(branch)) + len(slots), attend) for branch in branches]


def rounding_nudge(spec: AttentionSpec) -> Nudge:
    """Moves each output up or down by as much as two right kernels may differ.

    Both are within `Exact.bound` of the exact output, so within twice that of each other; both may
    round probabilities to the spec's dtype. What this does to the model's logits, through all
    later layers, is what rounding in attention explains; the rest of the model is the same in both
    paths. An attention logit is at most the product of the longest q and the longest K (Cauchy and
    Schwarz).
    """
    random = torch.Generator().manual_seed(0)

    def nudge(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logit = spec.scale * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
        like = Exact(out, out, logit, float(v.abs().max()), len(k))
        signs = torch.randint(0, 2, out.shape, generator=random) * 2 - 1
        return (out + 2 * like.bound(spec.dtype, spec.dtype).out * signs).to(out.dtype)

    return nudge


def _forest(text: FewShot, begin: list[int], end: list[int]) -> Forest:
    """The prompt, and under it tokens [0, end) of each branch, with rows from `begin` on."""
    rows = [last - first for first, last in zip(begin, end, strict=True)]
    return Forest.from_parents([-1] + [PROMPT] * len(end), [len(text.prompt), *end], [0, *rows])


def _plan(attention: TreeAttention, cache: Cache, before: Forest | None, now: Forest) -> Forest:
    """Plan `now`, the cheap way where only lengths have grown since `before`."""
    if before is not None and before.rows.tolist() == now.rows.tolist():
        attention.update(now)
    else:
        attention.plan(now, cache.pages)
    return now


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """SDPA with tokens first: ``[rows, heads, width]``."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)

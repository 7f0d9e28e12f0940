"""Models and caches for tests of decoding, and what they are held to: whole sequences, no cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache as once
from typing import Any

import torch
import torch.nn.functional as F
from small import SPEC, attention
from torch import Tensor

from deft_tvm.demo.model import Shape, Transformer
from deft_tvm.pool import PagePool
from deft_tvm.pytorch import PagedKVCache, Step, TreeAttention

Whole = Callable[[Sequence[Sequence[int]]], Tensor]
"""From whole sequences to ``[sequences, vocabulary]`` logits of what follows each."""

SHAPE = Shape(vocabulary=64, width=64, q_heads=8, kv_heads=2, head_width=64)


@once
def transformer() -> Transformer:
    return Transformer(SHAPE, seed=3)


@once
def _attention() -> TreeAttention:
    return attention()


def kv_cache(num_pages: int = 64) -> PagedKVCache:
    """A real cache of `transformer`'s layers, empty."""
    return PagedKVCache([SPEC] * SHAPE.layers, num_pages, attention=[_attention()])


def cached(tokens: Tensor, step: Step, keep: Tensor) -> Tensor:
    """`transformer` over a real cache: a `deft_tvm.decoding.Model`."""
    return transformer()(tokens, step.positions, step.attend)[keep]


@torch.no_grad()
def whole(sequences: Sequence[Sequence[int]]) -> Tensor:
    """`transformer` over each sequence by itself, by SDPA."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return torch.stack(
        [
            transformer()(torch.tensor(tokens), torch.arange(len(tokens)), attend)[-1]
            for tokens in sequences
        ]
    )


class TokenCache:
    """In place of a `PagedKVCache` one that caches the tokens themselves.

    A model over it sees for each row the sequence that lies in the row's pages, so whatever
    decodes over it is tested together with the pool, and needs no module.
    """

    device = torch.device("cpu")

    def __init__(self, num_pages: int = 64, page_size: int = 4) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.tokens = torch.full((num_pages * page_size,), -1)

    def step(
        self, counts: Mapping[int, int], drafts: Mapping[int, Sequence[int]] | None = None
    ) -> TokenStep:
        self.pool.append(counts, drafts)
        source, target = map(torch.from_numpy, self.pool.take_moves())
        self.tokens[target] = self.tokens[source]
        return TokenStep(self, dict(counts), dict(drafts or {}))

    def resize(self, num_pages: int) -> None:
        self.pool.resize(num_pages)
        new = torch.full((num_pages * self.pool.page_size,), -1)
        new[: len(self.tokens)] = self.tokens[: len(new)]
        self.tokens = new


class TokenStep:
    """A step over a `TokenCache`."""

    def __init__(
        self, cache: TokenCache, counts: dict[int, int], drafts: dict[int, Sequence[int]]
    ) -> None:
        self.cache, self.counts, self.drafts = cache, counts, drafts
        sizes = {**counts, **{branch: len(parents) for branch, parents in drafts.items()}}
        self.forest, self.pages = cache.pool.forest(sizes)
        self.num_rows = self.forest.num_rows

    def write(self, tokens: Tensor) -> list[list[int]]:
        """Cache the rows' tokens; the sequence that ends with each row."""
        assert tokens.shape == (self.num_rows,)
        assert tokens.dtype == torch.int64
        cache = self.cache
        cache.tokens[torch.from_numpy(self.pages.row_slots(self.forest))] = tokens
        paths = []
        for branch, count in self.counts.items():
            path = cache.tokens[torch.from_numpy(cache.pool.slots(branch))].tolist()
            paths += [path[: len(path) - count + row + 1] for row in range(count)]
        for branch, parents in self.drafts.items():
            path = cache.tokens[torch.from_numpy(cache.pool.slots(branch))].tolist()
            first = len(paths)
            for parent in parents:
                above = path if parent < 0 else paths[first + parent]
                paths.append([*above, int(tokens[len(paths)])])
        return paths


def over_tokens(function: Whole) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """A `deft_tvm.decoding.Model` over a `TokenCache` that computes whole sequences anew."""

    def model(tokens: Tensor, step: TokenStep, keep: Tensor) -> Tensor:
        paths = step.write(tokens)
        return function([paths[row] for row in keep.tolist()])

    return model


def random_logits(vocabulary: int, seed: int = 0, spread: float = 2.0) -> Whole:
    """Logits that depend on the last two tokens, from a table."""
    table = torch.randn(
        vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)
    )

    def function(sequences: Sequence[Sequence[int]]) -> Tensor:
        rows = [table[([0, *sequence])[-2], sequence[-1]] for sequence in sequences]
        return spread * torch.stack(rows) if rows else table.new_empty(0, vocabulary)

    return function


def llama(seed: int, vocabulary: int) -> Any:
    """A tiny random Llama of Hugging Face, whose `generate` is a witness."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def recomputed(model: Any) -> Whole:
    """A transformers model over whole sequences; those of one length together."""

    @torch.no_grad()
    def function(sequences: Sequence[Sequence[int]]) -> Tensor:
        groups: dict[int, list[int]] = defaultdict(list)
        for place, sequence in enumerate(sequences):
            groups[len(sequence)].append(place)
        out = torch.empty(len(sequences), model.config.vocab_size)
        for places in groups.values():
            batch = torch.tensor([sequences[place] for place in places])
            out[places] = model(batch, use_cache=False).logits[:, -1]
        return out

    return function

"""The same decoding with plain transformers: SDPA, and a cache of its own for each sequence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deft_tvm.decoding import Drafter, match
from deft_tvm.decoding.replay import RecordedNode
from deft_tvm.demo.smollm2.clock import Clock
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.pool import ROOT

NAME = "sdpa_on_the_clock"
GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
"""The environment variable by which transformers repeats no KV heads where there is a mask."""


@contextmanager
def on_the_clock(clock: Clock, model: Any) -> Iterator[None]:
    """While this lasts, `model` attends by SDPA, and `clock` counts that and the cache's copies."""
    AttentionInterface.register(NAME, clock.counted("attention", sdpa_attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    with clock.watching(
        (DynamicCache, "update", "attention"), (DynamicCache, "reorder_cache", "attention")
    ):
        yield


def held(cache: DynamicCache) -> int:
    """Bytes of K and V in all layers."""
    return sum(tensor.nbytes for layer in _layers(cache) for tensor in (layer.keys, layer.values))


def generated(
    model: Any, prompt: Sequence[int], copies: int = 1, *, read_once: bool = False, **options: Any
) -> Decoded:
    """What ``generate`` adds to a prompt.

    Args:
        model: attends by SDPA.
        prompt: tokens.
        copies: sequences that are decoded at once, samples or beams.
        read_once: read the prompt once and copy its KV for each of them, as a careful caller does;
            ``generate`` by itself reads it for each.
        options: of ``generate``.
    """
    ids = torch.tensor([prompt], device=model.device)
    cache = DynamicCache(config=model.config)
    began = time.perf_counter()
    if read_once:
        model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(copies)
    found = model.generate(ids, past_key_values=cache, **options)
    seconds = time.perf_counter() - began
    assert isinstance(found, Tensor)
    kv = held(cache)
    return Decoded([row[len(prompt) :].tolist() for row in found], seconds, kv, kv)


def verify(
    model: Any, cache: DynamicCache, tokens: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of a draft, by one masked call over cache and draft.

    Args:
        model: attends by SDPA.
        cache: what is known; it holds the whole draft afterwards, see `keep`.
        tokens: of the draft.
        parents: number of the token before each, -1 for the newest that is cached.
    """
    cached = cache.get_seq_length()
    device = model.device
    seen = torch.eye(len(tokens), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            seen[token] |= seen[parent]
    depth = seen.sum(dim=1) - 1
    mask = torch.cat([torch.ones(len(tokens), cached, dtype=torch.bool), seen], dim=1)
    found: Tensor = model(
        torch.tensor([tokens], device=device),
        attention_mask=mask[None, None].to(device),
        position_ids=(cached + depth)[None].to(device),
        past_key_values=cache,
    ).logits[0]
    return found


def keep(cache: DynamicCache, cached: int, path: Sequence[int]) -> None:
    """Of a draft after the first `cached` tokens, keep those of one path; no other is copied."""
    accepted = cached + torch.tensor(path, dtype=torch.int64)
    end = cached + len(path)
    for layer in _layers(cache):
        for states in (layer.keys, layer.values):
            states[:, :, cached:end] = states[:, :, accepted.to(states.device)]
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]


def speculated(model: Any, prompt: Sequence[int], drafter: Drafter, max_tokens: int) -> Decoded:
    """Speculative decoding: each draft is verified by one masked call, and its path kept."""
    began = time.perf_counter()
    cache, logits = _read(model, prompt)
    found, steps = [int(logits.argmax())], 1
    while len(found) < max_tokens:
        draft = drafter((*prompt, *found))
        cached = cache.get_seq_length()
        parents = [ROOT, *(parent + 1 for parent in draft.parents)]
        path, token = match(draft, verify(model, cache, [found[-1], *draft.tokens], parents))
        keep(cache, cached, [0, *(number + 1 for number in path)])
        found += [*(draft.tokens[number] for number in path), token]
        steps += 1
    kv = held(cache)
    return Decoded([found[:max_tokens]], time.perf_counter() - began, kv, kv, steps)


def replayed(
    model: Any,
    nodes: Sequence[RecordedNode],
    parents: Sequence[int],
    last: int,
    prompt: Sequence[int],
) -> Decoded:
    """The branching of a recorded tree, each live branch a row with a cache of its own.

    Tokens are chosen as by `deft_tvm.decoding.Replay`. A path grows by a token in each step, so
    that rows are always of one length.
    """
    began = time.perf_counter()
    cache, logits = _read(model, prompt)
    logits = logits[None]
    texts: dict[int, list[int]] = {0: []}
    for step in range(1, last + 1):
        grows = [n for n, node in enumerate(nodes) if node.start <= step <= node.end]
        before = list(texts)
        above = [n if n in texts else parents[n] for n in grows]
        ranks = [0 if n in texts else list(parents[:n]).count(parents[n]) for n in grows]
        rows = torch.tensor([before.index(n) for n in above], device=model.device)
        if grows != before:
            cache.batch_select_indices(rows)
        ranked = logits[rows].topk(max(ranks) + 1).indices
        tokens = [int(ranked[row, rank]) for row, rank in enumerate(ranks)]
        texts = {n: [*texts[a], t] for n, a, t in zip(grows, above, tokens, strict=True)}
        if step < last:
            new = torch.tensor(tokens, device=model.device)[:, None]
            logits = model(new, past_key_values=cache).logits[:, -1]
    kv = held(cache)
    return Decoded(list(texts.values()), time.perf_counter() - began, kv, kv)


def _read(model: Any, prompt: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """A prompt's KV, and the logits of what follows it."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=model.device)
    return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def _layers(cache: DynamicCache) -> list[Any]:
    """Those that hold something."""
    return [layer for layer in cache.layers if layer.is_initialized]

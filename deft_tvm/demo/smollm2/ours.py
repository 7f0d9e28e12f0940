"""Samples, beams and drafts as trees."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deft_tvm.decoding import Branch, Control, Drafter, decode, speculate
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.integrations.huggingface import NAME, HuggingFaceModel, TreeCache
from deft_tvm.pytorch import PagedKVCache, Step


class Watcher:
    """An observer of a decoding that knows what its last step held."""

    def __init__(self) -> None:
        self.steps = 0
        self.kv_held = 0

    def __call__(self, step: Step, live: Sequence[Branch]) -> None:
        """See `deft_tvm.decoding.Observe`."""
        self.steps += 1
        self.kv_held = step.cache.bytes_in_use


def kv_read(cache: PagedKVCache) -> int:
    """Bytes of KV that the last step read in all layers."""
    layers = Counter(cache.layers)
    return sum(count * cache.attention[spec].traffic.tree.kv for spec, count in layers.items())


def controlled(
    model: HuggingFaceModel, cache: PagedKVCache, prompt: Sequence[int], control: Control
) -> tuple[Decoded, list[Branch]]:
    """What a control makes of a prompt, and the branches that say so."""
    model.model.set_attn_implementation(NAME)
    watcher = Watcher()
    began = time.perf_counter()
    branches = decode(model, cache, [prompt], control, observe=watcher)
    seconds = time.perf_counter() - began
    texts = [list(branch.tokens) for branch in branches]
    return Decoded(texts, seconds, watcher.kv_held, kv_read(cache), watcher.steps), branches


def samples(
    model: HuggingFaceModel, cache: PagedKVCache, prompt: Sequence[int], control: Control
) -> Decoded:
    """`controlled` by a `deft_tvm.decoding.Sampling`, in the order in which a prompt was split."""
    found, branches = controlled(model, cache, prompt, control)
    order = sorted(range(len(branches)), key=lambda place: branches[place].state.row)
    return found._replace(texts=[found.texts[place] for place in order])


def drafted(
    model: HuggingFaceModel,
    cache: PagedKVCache,
    prompt: Sequence[int],
    drafter: Drafter,
    **options: Any,
) -> Decoded:
    """What follows a prompt, with drafts that the model verifies."""
    model.model.set_attn_implementation(NAME)
    watcher = Watcher()
    began = time.perf_counter()
    (found,) = speculate(model, cache, [prompt], drafter, observe=watcher, **options)
    seconds = time.perf_counter() - began
    return Decoded([list(found.tokens)], seconds, watcher.kv_held, kv_read(cache), found.passes)


def generated(model: Any, prompt: Sequence[int], **options: Any) -> Decoded:
    """What ``generate`` adds to a prompt, with trees below it."""
    model.set_attn_implementation(NAME)
    ids = torch.tensor([prompt], device=model.device)
    began = time.perf_counter()
    cache = TreeCache(model)
    cache.prefill(model, ids)
    found = model.generate(ids, past_key_values=cache, **options)
    seconds = time.perf_counter() - began
    assert isinstance(found, Tensor)
    texts = [row[len(prompt) :].tolist() for row in found]
    return Decoded(texts, seconds, cache.paged.bytes_in_use, kv_read(cache.paged))

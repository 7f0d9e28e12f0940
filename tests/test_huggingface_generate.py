"""``generate()`` over a `TreeCache`: token by token what transformers generates by itself.

Both compute logits with other roundings, which would show where two best tokens are within
rounding. Seeds are fixed, and greedy tests make sure that no two are: see `_greedy`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import new_cache, ours, tiny, tokens
from torch import Tensor

from deft_tvm.integrations.huggingface import TreeCache

SEEDS = (0, 1, 2)
APART = 1e-4
"""Logits that are closer would be a tie; rounding moves these models' by a tenth of that."""


def _greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """By transformers alone, where no step has a tie."""
    out = model.generate(
        ids,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": 8} | options,
    )
    for scores in out.scores:
        best, second = scores.topk(2).values.T
        assert (best - second).min() > APART, "a tie: take another seed"
    sequences: Tensor = out.sequences
    return sequences


def _padded(lengths: list[int], seed: int = 1) -> dict[str, Tensor]:
    """A batch with padding on the left."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = tokens(length, seed=seed + row)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _ours(model: Any, cache: TreeCache, **options: Any) -> Tensor:
    with ours(model):
        found: Tensor = model.generate(
            past_key_values=cache, **{"max_new_tokens": 8, "do_sample": False} | options
        )
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy(family: str, seed: int) -> None:
    model, ids = tiny(family, seed), tokens(2, 11, seed=seed)
    assert torch.equal(_ours(model, new_cache(model), input_ids=ids), _greedy(model, ids))


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_sampling(family: str, seed: int) -> None:
    model, ids = tiny(family, seed), tokens(2, 9, seed=seed)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    torch.manual_seed(seed)
    wanted = model.generate(ids, **options)
    cache = new_cache(model)
    cache.prefill(model, ids)
    torch.manual_seed(seed)
    assert torch.equal(_ours(model, cache, input_ids=ids, **options), wanted)
    assert cache.batch_size == 6


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v2"])
@pytest.mark.parametrize("seed", SEEDS)
def test_beams(family: str, seed: int, prefill: bool) -> None:
    model, ids = tiny(family, seed), tokens(2, 10, seed=seed)
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8}
    wanted = model.generate(ids, do_sample=False, **options)
    cache = new_cache(model)
    if prefill:
        cache.prefill(model, ids)
    assert torch.equal(_ours(model, cache, input_ids=ids, **options), wanted)


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_padding_on_the_left(options: dict[str, int], prefill: bool) -> None:
    model, batch = tiny("mistral"), _padded([9, 4, 1])
    wanted = model.generate(**batch, do_sample=False, max_new_tokens=8, **options)
    cache = new_cache(model)
    if prefill:
        cache.prefill(model, **batch)
    assert torch.equal(_ours(model, cache, **batch, **options), wanted)
    lengths = [cache.paged.pool.length(branch) for branch in cache.branches]
    times = options.get("num_beams", 1)
    assert lengths == [n + 7 for n in (9, 4, 1) for _ in range(times)]


def test_padding_is_never_cached() -> None:
    model, batch = tiny(), _padded([9, 2])
    cache = new_cache(model)
    _ours(model, cache, **batch, max_new_tokens=1)
    assert [cache.paged.pool.length(b) for b in cache.branches] == [9, 2]
    assert cache.get_seq_length() == 9


def test_rows_that_end_early() -> None:
    model, ids = tiny(seed=1), tokens(3, 8)
    free = _greedy(model, ids)
    # What the first row says third ends a row.
    end = int(free[0, 10])
    wanted = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=end)
    assert (wanted[0, 11:] == 0).all()
    found = _ours(model, new_cache(model), input_ids=ids, eos_token_id=end)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("lengths", [[7, 7], [7, 3]])
def test_a_conversation_goes_on_with_the_same_cache(lengths: list[int]) -> None:
    model, batch = tiny("qwen2"), _padded(lengths)
    cache = new_cache(model)
    first = _ours(model, cache, **batch)
    longer = torch.cat([first, tokens(2, 5, seed=9)], 1)
    mask = torch.ones_like(longer)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    wanted = _greedy(model, longer, attention_mask=mask)
    held = cache.get_seq_length()
    assert held == first.shape[1] - 1
    assert torch.equal(_ours(model, cache, input_ids=longer, attention_mask=mask), wanted)
    assert cache.get_seq_length() == wanted.shape[1] - 1


def test_one_row_goes_on_as_many_beams() -> None:
    model, ids = tiny(), tokens(1, 9)
    cache = new_cache(model)
    longer = torch.cat([_ours(model, cache, input_ids=ids), tokens(1, 3, seed=5)], 1)
    wanted = model.generate(longer, num_beams=3, max_new_tokens=6, do_sample=False)
    found = _ours(model, cache, input_ids=longer, num_beams=3, max_new_tokens=6)
    assert torch.equal(found, wanted)
    assert cache.batch_size == 3


def test_a_prompt_is_read_in_chunks() -> None:
    model, batch = tiny("mistral"), _padded([11, 3])
    # Columns without any token make a chunk that has no rows.
    batch = {name: F.pad(columns, (5, 0)) for name, columns in batch.items()}
    wanted = _greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(_ours(model, new_cache(model), **batch, prefill_chunk_size=4), wanted)


def test_drafts_from_the_prompt_are_cropped() -> None:
    model = tiny()
    ids = tokens(1, 6).repeat(1, 3)
    cache = new_cache(model)
    found = _ours(model, cache, input_ids=ids, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(found, _greedy(model, ids, max_new_tokens=12))
    assert cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize(
    "options", [{"num_beams": 8}, {"num_return_sequences": 8, "do_sample": True}]
)
def test_beams_and_samples_hold_a_prompt_once(options: dict[str, Any]) -> None:
    model, ids = tiny(), tokens(1, 30)
    cache = new_cache(model)
    cache.prefill(model, ids)
    assert cache.get_seq_length() == 29
    read = cache.paged.bytes_in_use
    assert read == cache.paged.pages_for(29) * cache.paged.bytes_per_page
    _ours(model, cache, input_ids=ids, max_new_tokens=5, **options)
    pool = cache.paged.pool
    slots = torch.stack([torch.from_numpy(pool.slots(branch)) for branch in cache.branches])
    assert slots.shape == (8, 34)
    assert len(slots[:, :29].unique()) == 29
    # Each beam has pages of its own for 5 tokens at most, from anywhere in a page on.
    pages = pool.num_pages - pool.num_free
    assert pages <= cache.paged.pages_for(29) + 8 * (1 + cache.paged.pages_for(5))


def test_without_prefill_each_row_is_read_for_itself_until_beams_meet() -> None:
    model, ids = tiny(), tokens(1, 30)
    cache, beams = new_cache(model), new_cache(model)
    _ours(model, cache, input_ids=ids, num_return_sequences=8, do_sample=True, max_new_tokens=1)
    assert cache.paged.bytes_in_use == 8 * cache.paged.pages_for(30) * cache.paged.bytes_per_page
    # All beams are the first one's after a step.
    _ours(model, beams, input_ids=ids, num_beams=8, max_new_tokens=1)
    assert beams.paged.bytes_in_use == beams.paged.pages_for(30) * beams.paged.bytes_per_page


def test_prompts_share_their_beginnings() -> None:
    model = tiny("qwen3")
    ids = torch.cat([tokens(1, 12).repeat(4, 1), tokens(4, 3, seed=4)], 1)
    ids[1, 13:] = ids[0, 13:]
    ids[1, 12] = ids[0, 12]
    cache = new_cache(model)
    cache.prefill(model, ids)
    pool = cache.paged.pool
    slots = torch.stack([torch.from_numpy(pool.slots(branch)) for branch in cache.branches])
    assert slots.shape == (4, 14)
    assert len(slots[:, :12].unique()) == 12
    assert torch.equal(slots[0], slots[1])
    assert len(slots.unique()) == 12 + 3 * 2
    assert torch.equal(_ours(model, cache, input_ids=ids), _greedy(model, ids))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pages_double_and_results_stay(mode: Any) -> None:
    model, ids = tiny(), tokens(2, 9)
    cache = new_cache(model, num_pages=1)
    with mode():
        found = _ours(model, cache, input_ids=ids, max_new_tokens=20)
    assert torch.equal(found, _greedy(model, ids, max_new_tokens=20))
    pool = cache.paged.pool
    assert 2 * cache.paged.pages_for(28) <= pool.num_pages <= 4 * cache.paged.pages_for(28)
    # Pages that grew in inference mode can be written to outside of it.
    longer = torch.cat([found, tokens(2, 2)], 1)
    all_of_it = {"attention_mask": torch.ones_like(longer)}
    wanted = _greedy(model, longer, **all_of_it)
    assert torch.equal(_ours(model, cache, input_ids=longer, **all_of_it), wanted)

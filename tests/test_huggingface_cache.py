"""`TreeCache` call by call: rows that fork, are cropped and fail, beside whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nudged import explained, sequence_logits
from tiny_models import PAGE_SIZE, new_cache, ours, tiny, tokens
from torch import Tensor

from deft_tvm.errors import InputError, OutOfPages
from deft_tvm.integrations.huggingface import TreeCache
from deft_tvm.pytorch import TreeAttention


def _read(model: Any, cache: TreeCache, ids: Tensor, **options: Any) -> Tensor:
    """Logits ``[B, L, vocabulary]`` of the next columns."""
    with ours(model), torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True, **options).logits
    return logits


def _as_sequences(model: Any, cache: TreeCache, texts: Tensor, logits: Tensor) -> None:
    """`logits` of the newest columns are those of `texts`, all that rows hold."""
    assert cache.get_seq_length() == texts.shape[1]
    assert [cache.paged.pool.length(b) for b in cache.branches] == [texts.shape[1]] * len(texts)
    wanted = torch.stack([sequence_logits(model, text) for text in texts])
    error = (logits - wanted[:, -logits.shape[1] :]).abs().max()
    assert error <= explained(model, list(texts))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_prompt_and_steps(family: str) -> None:
    model, ids = tiny(family), tokens(2, 14)
    cache = new_cache(model)
    parts = [_read(model, cache, part) for part in ids.split([9, 1, 1, 3], dim=1)]
    _as_sequences(model, cache, ids, torch.cat(parts, 1))


def test_a_compiled_model_breaks_its_graph_where_attention_is() -> None:
    model, ids = tiny(), tokens(2, 9)
    cache = new_cache(model)
    compiled = torch.compile(model, backend="eager")
    with ours(model), torch.no_grad():
        parts = [compiled(part, past_key_values=cache).logits for part in ids.split([8, 1], dim=1)]
    _as_sequences(model, cache, ids, torch.cat(parts, 1))


def test_positions_of_padding_may_be_those_of_columns() -> None:
    """Without positions transformers counts padding too; distances are the same."""
    model, ids = tiny("qwen3"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(model)
    parts = [
        _read(model, cache, ids[:, a:b], attention_mask=mask[:, :b])
        for a, b in ((0, 3), (3, 8), (8, 9))
    ]
    found = torch.cat(parts, 1)
    bound = explained(model, [ids[0], ids[1, 4:]])
    assert (found - wanted)[mask.bool()].abs().max() <= bound
    assert [cache.paged.pool.length(b) for b in cache.branches] == [9, 5]


def test_rows_are_reordered_and_no_element_moves() -> None:
    model, ids, new = tiny(), tokens(3, 10), tokens(3, 2, seed=3)
    cache = new_cache(model)
    _read(model, cache, ids)
    before = [buffer.clone() for layer in cache.paged.buffers for buffer in layer]
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    after = [buffer for layer in cache.paged.buffers for buffer in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Row 1 is nobody's any more, and its pages are free.
    pages = cache.paged.pool.num_pages - cache.paged.pool.num_free
    assert pages == 2 * cache.paged.pages_for(10)
    assert sorted(cache.branches) == sorted(cache.paged.pool.branches)
    logits = _read(model, cache, new)
    _as_sequences(model, cache, torch.cat([ids[order], new], 1), logits)


def test_rows_are_repeated_and_selected() -> None:
    model, ids, new = tiny("qwen2"), tokens(2, 6), tokens(3, 2, seed=3)
    cache = new_cache(model)
    _read(model, cache, ids)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    logits = _read(model, cache, new)
    _as_sequences(model, cache, torch.cat([ids[[0, 1, 1]], new], 1), logits)
    cache.batch_select_indices(torch.tensor([2]))
    logits = _read(model, cache, new[:1])
    text = torch.cat([ids[1:], new[2:], new[:1]], 1)
    _as_sequences(model, cache, text, logits)


def test_a_batch_of_more_rows_continues_each_several_times() -> None:
    model, ids, new = tiny(), tokens(2, 6), tokens(6, 3, seed=3)
    cache = new_cache(model)
    _read(model, cache, ids)
    logits = _read(model, cache, new)
    text = torch.cat([ids.repeat_interleave(3, 0), new], 1)
    _as_sequences(model, cache, text, logits)


def test_rows_with_padding_are_continued_several_times() -> None:
    model, ids, new = tiny(), tokens(2, 6), tokens(4, 1, seed=3)
    mask = torch.tensor([[0] * 2 + [1] * 4, [1] * 6])
    cache = new_cache(model)
    _read(model, cache, ids, attention_mask=mask)
    longer = torch.cat([mask.repeat_interleave(2, 0), torch.ones_like(new)], 1)
    found = _read(model, cache, new, attention_mask=longer)
    assert [cache.paged.pool.length(b) for b in cache.branches] == [5, 5, 7, 7]
    texts = [torch.cat([ids[row // 2][mask[row // 2] > 0], new[row]]) for row in range(4)]
    wanted = torch.stack([sequence_logits(model, text)[-1] for text in texts])
    assert (found[:, -1] - wanted).abs().max() <= explained(model, texts)


def test_no_rows_are_an_empty_cache() -> None:
    model, ids = tiny(), tokens(2, 6)
    cache = new_cache(model)
    first = _read(model, cache, ids)
    cache.batch_select_indices(torch.empty(0, dtype=torch.int64))
    assert (cache.batch_size, cache.get_seq_length(), cache.paged.bytes_in_use) == (0, 0, 0)
    assert torch.equal(_read(model, cache, ids), first)


@pytest.mark.parametrize("removed", [0, 2, 7, 11])
def test_columns_are_cropped(removed: int) -> None:
    """Into what rows have for themselves, what they share, and to nothing."""
    model, ids, new = tiny("qwen3"), tokens(1, 8), tokens(2, 3, seed=3)
    cache = new_cache(model)
    _read(model, cache, ids)
    _read(model, cache, new)
    cache.crop(-removed)
    text = torch.cat([ids.repeat(2, 1), new], 1)[:, : 11 - removed]
    assert cache.get_seq_length() == 11 - removed
    more = tokens(2, 4, seed=8)
    _as_sequences(model, cache, torch.cat([text, more], 1), _read(model, cache, more))


def test_padding_is_cropped_too() -> None:
    model, ids = tiny(), tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    cache = new_cache(model)
    _read(model, cache, ids, attention_mask=mask)
    cache.crop(-3)
    assert [cache.paged.pool.length(b) for b in cache.branches] == [3, 0]
    _read(model, cache, ids[:, 3:], attention_mask=mask)
    assert [cache.paged.pool.length(b) for b in cache.branches] == [6, 2]


def test_reset_frees_all_pages() -> None:
    model, ids = tiny(), tokens(2, 9)
    cache = new_cache(model)
    first = _read(model, cache, ids)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.paged.bytes_in_use) == (0, 0, 0)
    assert torch.equal(_read(model, cache, ids), first)
    hook = _failing(model.model.layers[0].mlp)
    with pytest.raises(Interrupted):
        _read(model, cache, ids[:, :1])
    hook.remove()
    cache.reset()
    assert cache.batch_size == 0 and not list(cache.paged.pool.branches)


def test_prompts_of_one_token_leave_nothing_to_prefill() -> None:
    model, ids = tiny(), tokens(2, 1)
    cache = new_cache(model)
    cache.prefill(model, ids)
    assert (cache.batch_size, cache.get_seq_length(), cache.paged.bytes_in_use) == (2, 0, 0)
    _as_sequences(model, cache, ids, _read(model, cache, ids))


class Interrupted(Exception):
    """What a layer fails with."""


def _interrupt(*_: Any) -> None:
    raise Interrupted


def _failing(module: Any) -> Any:
    return module.register_forward_pre_hook(_interrupt)


@pytest.mark.parametrize("place", ["0.input_layernorm", "0.mlp", "1.self_attn.v_proj"])
def test_a_pass_that_fails_leaves_nothing(place: str) -> None:
    model, ids, new = tiny(), tokens(2, 7), tokens(4, 2, seed=3)
    cache = new_cache(model)
    for text, batch in ((ids[:, :0], ids), (ids, new)):
        hook = _failing(model.model.layers.get_submodule(place))
        with pytest.raises(Interrupted):
            _read(model, cache, batch)
        hook.remove()
        assert cache.get_seq_length() == text.shape[1]
        assert cache.batch_size == (2 if text.numel() else 0)
        logits = _read(model, cache, batch)
        texts = torch.cat([text.repeat_interleave(len(batch) // 2, 0), batch], 1)
        _as_sequences(model, cache, texts, logits)


def test_a_pass_that_cannot_be_planned_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), tokens(2, 7)
    cache = new_cache(model)
    _read(model, cache, ids)
    with monkeypatch.context() as patch:
        patch.setattr(TreeAttention, "plan", _interrupt)
        with pytest.raises(Interrupted):
            _read(model, cache, tokens(4, 2))
    assert (cache.batch_size, cache.get_seq_length()) == (2, 7)
    more = tokens(2, 1)
    _as_sequences(model, cache, torch.cat([ids, more], 1), _read(model, cache, more))


def test_a_pass_that_fails_before_another_use_is_forgotten() -> None:
    model, ids = tiny(), tokens(2, 7)
    cache = new_cache(model)
    _read(model, cache, ids)
    for use in (lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: cache.crop(-1)):
        hook = _failing(model.model.layers[0].mlp)
        with pytest.raises(Interrupted):
            _read(model, cache, ids[:, :1])
        hook.remove()
        use()
    assert [cache.paged.pool.length(b) for b in cache.branches] == [6, 6]
    more = tokens(2, 1)
    text = torch.cat([ids[[1, 0], :6], more], 1)
    _as_sequences(model, cache, text, _read(model, cache, more))


def test_rows_that_only_a_failed_pass_had_are_not_there() -> None:
    model, ids = tiny(), tokens(2, 7)
    for use in (
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([True, True])),
    ):
        cache = new_cache(model)
        _read(model, cache, ids)
        hook = _failing(model.model.layers[0].mlp)
        with pytest.raises(Interrupted):
            _read(model, cache, tokens(4, 1))
        hook.remove()
        use(cache)
        texts = ids.repeat_interleave(cache.batch_size // 2, 0)
        more = tokens(len(texts), 1)
        _as_sequences(model, cache, torch.cat([texts, more], 1), _read(model, cache, more))

    hook = _failing(model.model.layers[0].mlp)
    with pytest.raises(Interrupted):
        _read(model, cache, tokens(4, 1))
    hook.remove()
    with pytest.raises(InputError, match=r"beam_idx\[0\] is 3; expected one of 2 rows"):
        cache.reorder_cache(torch.tensor([3, 0]))


def test_pages_end_where_they_must() -> None:
    model, ids = tiny(), tokens(1, 9)
    cache = new_cache(model, num_pages=2, max_pages=5)
    _read(model, cache, ids)
    assert cache.paged.pool.num_pages == 4
    with pytest.raises(OutOfPages, match=r"are needed and .* of num_pages=5 are free"):
        _read(model, cache, tokens(4, 9))
    assert (cache.batch_size, cache.get_seq_length()) == (1, 9)
    more = tokens(1, 5)
    _as_sequences(model, cache, torch.cat([ids, more], 1), _read(model, cache, more))
    assert cache.paged.pool.num_free == 5 - cache.paged.pages_for(14) == 1

    assert new_cache(model, num_pages=2, max_pages=2).max_pages == 2
    empty = new_cache(model, num_pages=1, max_pages=2)
    with pytest.raises(OutOfPages, match="num_pages=2"):
        empty.prefill(model, ids.repeat(1, 2))
    assert (empty.batch_size, empty.paged.pool.num_free) == (0, 2)
    assert not list(empty.paged.pool.branches)
    with pytest.raises(OutOfPages, match="num_pages=2"):
        _read(model, empty, ids)
    assert (empty.batch_size, empty.paged.pool.num_free) == (0, 2)


def test_two_caches_of_one_model_take_turns() -> None:
    model, ids = tiny(), tokens(2, 8)
    attention = new_cache(model).paged.attention.values()
    one, other = (TreeCache(model, page_size=PAGE_SIZE, attention=attention) for _ in range(2))
    _read(model, one, ids[:1])
    _read(model, other, ids[1:])
    for cache, row in ((one, 0), (other, 1)):
        more = tokens(1, 2)
        text = torch.cat([ids[row : row + 1], more], 1)
        _as_sequences(model, cache, text, _read(model, cache, more))
    assert not {*one.paged.attention.values()} & {*other.paged.attention.values()}


def test_what_transformers_asks_a_cache() -> None:
    model = tiny("qwen3")
    cache = new_cache(model)
    _read(model, cache, tokens(2, 3))
    assert len(cache) == 2
    assert cache.get_mask_sizes(4, 1) == (7, 0)
    assert cache.get_max_length() == cache.layers[0].get_max_length() == -1
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 3]
    assert cache.layers[1].get_mask_sizes(4) == (7, 0)
    assert (cache.is_compileable, cache.is_croppable) == (False, True)
    assert cache.is_sliding == [False, False]
    assert repr(cache).startswith("TreeCache(rows=2, columns=3, PagedKVCache(layers=2")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda c: c.crop(1), "tokens_to_remove is 1; expected -3 to 0"),
        (lambda c: c.crop(-4), "tokens_to_remove is -4; expected -3 to 0"),
        (
            lambda c: c.reorder_cache(torch.tensor([0, 2])),
            r"beam_idx\[1\] is 2; expected one of 2 rows",
        ),
        (
            lambda c: c.batch_select_indices(torch.tensor([-1])),
            r"indices\[0\] is -1; expected one of 2 rows",
        ),
        (
            lambda c: c.batch_select_indices(torch.tensor([True])),
            r"indices is bool of shape \[1\]; expected \[2\], one for each row",
        ),
        (
            lambda c: c.reorder_cache(torch.tensor([[0, 1]])),
            r"beam_idx is torch.int64 of shape \[1, 2\]; expected numbers of rows",
        ),
        (
            lambda c: c.reorder_cache(torch.tensor([0.0, 1.0])),
            r"beam_idx is torch.float32 of shape \[2\]; expected numbers of rows",
        ),
        (lambda c: c.batch_repeat_interleave(0), "repeats is 0; expected 1 or more"),
        (lambda c: c.batch_repeat_interleave(1.5), "repeats is 1.5; expected an integer"),
        (lambda c: c.crop(-1.5), "tokens_to_remove is -1.5; expected an integer"),
    ],
)
def test_rows_and_columns_that_are_not_there(use: Any, message: str) -> None:
    model = tiny()
    cache = new_cache(model)
    _read(model, cache, tokens(2, 3))
    with pytest.raises(InputError, match=message):
        use(cache)
    assert (cache.batch_size, cache.get_seq_length()) == (2, 3)


def test_batches_that_do_not_go_on() -> None:
    model = tiny()
    cache = new_cache(model)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    _read(model, cache, tokens(2, 6), attention_mask=padded)
    for options, message in (
        ({"ids": tokens(3, 1)}, "input_ids has 3 rows, and the cache 2; expected as many or a"),
        ({"ids": tokens(1, 1)}, "input_ids has 1 rows, and the cache 2"),
        (
            {"ids": tokens(2, 1)},
            r"attention_mask\[0\] has 6 tokens in the first 6 columns; expected 4, those that",
        ),
        (
            {"ids": tokens(2, 1), "attention_mask": torch.tensor([[0] + [1] * 6, [1] * 7])},
            r"attention_mask\[0\] has 5 tokens in the first 6 columns; expected 4",
        ),
        (
            {"ids": tokens(2, 1), "attention_mask": torch.tensor([[0] * 3 + [1] * 4, [1] * 7])},
            r"attention_mask\[0\] has 3 tokens in the first 6 columns; expected 4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            _read(model, cache, **options)
    assert [cache.paged.pool.length(b) for b in cache.branches] == [4, 6]


def test_a_prompt_is_read_into_an_empty_cache() -> None:
    model = tiny()
    cache = new_cache(model)
    _read(model, cache, tokens(2, 3))
    with pytest.raises(InputError, match=r"the cache has 2 rows; expected none: reset\(\)"):
        cache.prefill(model, tokens(2, 3))

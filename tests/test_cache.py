"""Paged caches: random steps beside full copies, what is written and read, and every refusal."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from built import SMALL, artifact
from cached import OPERATIONS, CacheMachine, new_cache
from torch import Tensor

from deft_tvm.dtypes import FP8
from deft_tvm.errors import InputError, OutOfPages, PageError, PlanError, SpecError
from deft_tvm.fp8 import quantize
from deft_tvm.pool import ROOT
from deft_tvm.pytorch import PagedKVCache, Step, TreeAttention, load
from deft_tvm.spec import AttentionSpec

WINDOWED = replace(SMALL, window=5, layout="HND")
MLA = AttentionSpec.mla(
    num_q_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, page_size=4
)
GTA = AttentionSpec.gta(
    num_q_heads=4, num_kv_heads=2, head_dim=16, rope_dim=8, page_size=4, layout="HND"
)
BFLOAT16 = AttentionSpec.gqa(
    num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=4, dtype="bfloat16", sinks=True
)
EIGHT_BITS = replace(
    BFLOAT16, buffers=tuple(replace(b, dtype=FP8) for b in BFLOAT16.buffers), sinks=False
)

MODELS = {
    "windowed": ([SMALL, WINDOWED, SMALL], 1.0),
    "tied": ([MLA, GTA], 1.0),
    "narrow": ([BFLOAT16, EIGHT_BITS], 0.01),
}


@pytest.mark.parametrize("name", MODELS)
def test_random_steps(name: str) -> None:
    layers, scale = MODELS[name]
    counted: Counter[str] = Counter()
    for seed, num_pages in enumerate((60, 20, 9)):
        machine = CacheMachine(layers, num_pages, seed, scale)
        machine.run(300)
        counted += machine.counted
    assert min(counted[name] for name in (*OPERATIONS, "out of pages")) >= 10


def two_branches(num_pages: int = 8) -> tuple[PagedKVCache, list[int]]:
    """A prompt of 6 tokens in pages of 4, and two branches that go on with one token each."""
    cache = new_cache([SMALL, SMALL], num_pages)
    prompt = cache.pool.root()
    fill(cache.step({prompt: 6}))
    branches = [prompt, *cache.pool.fork(prompt)]
    fill(cache.step(dict.fromkeys(branches, 1)))
    return cache, branches


def fill(step: Step) -> None:
    """Let all elements of a row be its position in K, and the same below zero in V."""
    rows = step.positions.float()[:, None, None].expand(-1, 2, 16)
    for layer in range(len(step.cache.layers)):
        step.write(layer, rows, -rows)


def test_what_it_is() -> None:
    cache, branches = two_branches()
    assert repr(cache) == (
        "PagedKVCache(layers=2, PagePool(num_pages=8, page_size=4, free=5, branches=2))"
    )
    assert cache.layers == (SMALL, SMALL) and list(cache.attention) == [SMALL]
    # K and V of 2 heads of 16 float32 in 2 layers.
    assert cache.bytes_per_page == 4 * 2 * 2 * 2 * 16 * 4
    assert cache.bytes_in_use == 3 * cache.bytes_per_page
    assert [cache.pages_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [buffer.shape for buffer in cache.buffers[1]] == [(8, 4, 2, 16)] * 2
    cache.pool.prune(*branches)
    assert cache.bytes_in_use == 0


def test_shapes_of_layouts_and_types() -> None:
    cache = new_cache([WINDOWED, GTA, EIGHT_BITS], 3)
    assert [[(b.shape, b.dtype) for b in layer] for layer in cache.buffers] == [
        [((3, 2, 4, 16), torch.float32)] * 2,
        [((3, 2, 4, 16), torch.float32), ((3, 1, 4, 8), torch.float32)],
        [((3, 4, 2, 16), torch.float8_e4m3fn)] * 2,
    ]


def test_a_new_cache_is_zero() -> None:
    cache = PagedKVCache([SMALL], 3, attention=[load(artifact(SMALL))])
    assert all(not buffer.any() for buffer in cache.buffers[0])


def test_reading() -> None:
    cache, (one, _) = two_branches()
    k, v = cache.read(one, 1)
    assert k.shape == v.shape == (7, 2, 16)
    assert k[:, 1, 3].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and torch.equal(v, -k)
    k.fill_(9.0)
    assert not (cache.read(one, 1)[0] == 9).any(), "it is a copy"


def test_reading_does_what_is_to_be_moved() -> None:
    cache, (one, two) = two_branches()
    cache.pool.prune(one)
    assert cache.pool.slots(two).tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert cache.read(two, 0)[0][:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_rows_are_in_the_order_of_counts_then_drafts() -> None:
    cache, (one, two) = two_branches()
    three = cache.pool.fork(two)[0]
    step = cache.step({two: 2, one: 1}, {three: [ROOT, ROOT, 0]})
    assert step.num_rows == 6 and step.positions.dtype == torch.int64
    assert step.positions.tolist() == [7, 8, 7, 7, 7, 8]
    assert repr(step.forest) == "Forest(nodes=8, trees=1, levels=5, tokens=14, rows=6)"


def test_a_step_without_tokens() -> None:
    cache, (one, two) = two_branches()
    for counts in ({}, {one: 0, two: 0}):
        step = cache.step(counts)
        assert step.num_rows == 0 and step.positions.tolist() == []
        out = step.attend(0, torch.zeros(0, 4, 16), *[torch.zeros(0, 2, 16)] * 2)
        assert out.shape == (0, 4, 16)


def test_a_step_runs_by_its_own_plan_after_a_later_one() -> None:
    cache, (one, two) = two_branches()
    first = cache.step({one: 2})
    fill(first)
    later = cache.step({two: 1})
    fill(later)
    q = torch.zeros(2, 4, 16)
    for _ in range(2):
        # Scores are the same for all tokens: the mean of positions 0 to 7, and 0 to 8.
        out, _ = first.run(1, q)
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([-3.5, -4.0]))
        out, _ = later.run(1, q[:1])
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([-3.5]))


def test_resize_and_defragment_keep_what_is_cached() -> None:
    cache, (one, two) = two_branches()
    cache.pool.prune(one)
    with pytest.raises(PageError, match="num_pages is 2 and page 2 is in use; expected more than"):
        cache.resize(2)
    assert [len(buffer) for layer in cache.buffers for buffer in layer] == [8] * 4
    cache.defragment()
    for num_pages in (2, 30):
        cache.resize(num_pages)
        assert [len(buffer) for layer in cache.buffers for buffer in layer] == [num_pages] * 4
        assert cache.read(two, 1)[0][:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with pytest.raises(PageError, match="num_pages is -1; expected 0 or more"):
        cache.resize(-1)


def test_where_memory_does_not_suffice_for_more_pages_all_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, (one, _) = two_branches()
    zeros, asked = cache._zeros, []

    def no_more(spec: AttentionSpec, num_pages: int) -> tuple[torch.Tensor, ...]:
        asked.append(num_pages)
        if len(asked) == 2:
            raise MemoryError
        return zeros(spec, num_pages)

    monkeypatch.setattr(cache, "_zeros", no_more)
    with pytest.raises(MemoryError):
        cache.resize(100)
    assert cache.pool.num_pages == 8 and asked == [100, 100]
    assert cache.read(one, 0)[0][:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with pytest.raises(OutOfPages):
        cache.step({one: 28})
    fill(cache.step({one: 20}))


@pytest.mark.parametrize("error", [PlanError, MemoryError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_branches_as_they_were(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    cache, (one, two) = two_branches()
    before = (cache.pool.num_free, cache.pool.references, cache.pool.length(one))

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TreeAttention, "plan", fail)
        for counts, drafts in (({one: 9}, {two: [ROOT, 0, ROOT]}), ({}, {one: [ROOT], two: []})):
            with pytest.raises(error):
                cache.step(counts, drafts)
            assert (cache.pool.num_free, cache.pool.references, cache.pool.length(one)) == before
    fill(cache.step({one: 2}, {two: [ROOT]}))
    assert cache.read(one, 0)[0][:, 0, 0].tolist() == [*map(float, range(9))]


def test_what_could_not_be_moved_is_moved_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, (one, two) = two_branches()
    cache.pool.prune(one)
    by_token = cache._by_token

    def no_memory() -> Iterator[Tensor]:
        yield next(iter(by_token()))
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_by_token", no_memory)
        with pytest.raises(MemoryError):
            cache.step({two: 1})
    for layer in range(2):
        found = cache.read(two, layer)[0][:, 0, 0].tolist()
        assert found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_cache_of_inference_mode_is_written_to_outside_of_it() -> None:
    with torch.inference_mode():
        cache, (one, _) = two_branches()
        cache.resize(9)
    fill(cache.step({one: 1}))
    assert cache.read(one, 0)[0][-1, 0, 0] == 7
    with torch.inference_mode():
        fill(cache.step({one: 1}))


def test_elements_that_8_bits_do_not_hold_are_the_largest() -> None:
    cache = new_cache([EIGHT_BITS], 2, scale=0.5)
    branch = cache.pool.root()
    rows = torch.tensor([1e9, -1e9, 0.5, 224.0]).bfloat16()[:, None, None].expand(-1, 2, 16)
    cache.step({branch: 4}).write(0, rows, rows)
    assert cache.read(branch, 0)[0].float()[:, 1, 7].tolist() == [448.0, -448.0, 1.0, 448.0]


def test_elements_in_8_bits_are_rounded_once() -> None:
    """Those of bfloat16 over a scale that is no power of two, which `quantize` rounds as well."""
    rows = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, scales = quantize(rows, by_page=False)
    scale = float(scales[0])
    cache = new_cache([EIGHT_BITS], 1, scale=scale)
    branch = cache.pool.root()
    cache.step({branch: 4}).write(0, rows, rows)
    assert torch.equal(cache.read(branch, 0)[0][:, 0].float(), wanted[:, 0].float())


def test_scales_are_float32_whatever_is_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        cache = new_cache([EIGHT_BITS], 1)
    finally:
        torch.set_default_dtype(torch.float32)
    step = cache.step({cache.pool.root(): 1})
    row = torch.ones(1, 2, 16, dtype=torch.bfloat16)
    assert (step.attend(0, torch.ones(1, 4, 16, dtype=torch.bfloat16), row, row) == 1).all()


def test_refusals() -> None:
    runner = load(artifact(SMALL))
    with pytest.raises(SpecError, match=re.escape("layers have page sizes []; expected one for")):
        PagedKVCache([], 4)
    with pytest.raises(SpecError, match=re.escape("layers have page sizes [4, 8]; expected one")):
        PagedKVCache([SMALL, replace(SMALL, page_size=8)], 4)
    sentence = f"attention has one for {SMALL}; expected {WINDOWED}"
    with pytest.raises(InputError, match=re.escape(sentence)):
        PagedKVCache([WINDOWED], 4, attention=[runner])
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(SpecError, match=f"scale is {scale}; expected a finite number above"):
            PagedKVCache([SMALL], 4, scale=scale)
    with pytest.raises(PageError, match="num_pages is -1; expected 0 or more"):
        PagedKVCache([SMALL], -1, attention=[runner])
    with pytest.raises(PageError, match=re.escape("num_pages is 2.5; expected an integer")):
        PagedKVCache([SMALL], 2.5, attention=[runner])
    cache, (one, _) = two_branches()
    with pytest.raises(PageError, match="branch is 7; expected one of 0, 1"):
        cache.read(7, 0)
    with pytest.raises(PageError, match="branch is 7; expected one of 0, 1"):
        cache.step({7: 1})
    with pytest.raises(OutOfPages, match="7 more pages are needed and 5 of num_pages=8 are free"):
        cache.step({one: 28})
    assert cache.pool.length(one) == 7
    step = cache.step({one: 2})
    q, new = torch.zeros(2, 4, 16), torch.zeros(2, 2, 16)
    for given, sentence in (
        ((q, new), "new has 1 tensors; expected one for each of k, v"),
        ((q, new, new, new), "new has 3 tensors; expected one for each of k, v"),
        ((q, new[:1], new), "new k has shape (1, 2, 16); expected (2, 2, 16)"),
        ((q, new, q), "new v has shape (2, 4, 16); expected (2, 2, 16)"),
        ((q[:1], new, new), "q has shape [1, 4, 16]; expected [2, 4, 16]"),
        ((q, new.numpy(), new), "new k is ndarray; expected a torch.Tensor"),
        ((q, new, new.long()), "new v has dtype torch.int64; expected a float dtype"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            step.attend(0, *given)
    for use in (step.write, step.run, lambda layer, *_: cache.read(one, layer)):
        for layer in (-1, 2):
            with pytest.raises(InputError, match=f"layer is {layer}; expected 0 to 1"):
                use(layer, new, *[new] * (use == step.write))
    sentence = "new k requires grad, and there is no backward; expected torch.no_grad(), "
    with pytest.raises(InputError, match=re.escape(sentence)):
        step.attend(0, q, new.clone().requires_grad_(), new)
    assert not cache.buffers[0][0].requires_grad
    with torch.no_grad():
        step.attend(0, q, new.clone().requires_grad_(), new)
    with pytest.raises(InputError, match="sinks is given; expected none, since the spec has sinks"):
        step.attend(0, q, new, new, sinks=torch.zeros(4))

"""Real weights: SmolLM2 decodes by trees to the tokens of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from deft_tvm.decoding import NGramDrafter, Replay, Sampling, greedy
from deft_tvm.demo.smollm2 import end_to_end, ours, plain, prompts, weights
from deft_tvm.demo.smollm2.clock import Clock
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.demo.smollm2.drawing import drawing
from deft_tvm.errors import DeftError
from deft_tvm.integrations.huggingface import HuggingFaceModel
from deft_tvm.tree import Forest
from deft_tvm.workloads.published import EAGLE

TOKENS = 12


class Real:
    """The model in both ways, a short prompt, and one so long that every device reads it once."""

    def __init__(self) -> None:
        self.net, self.tokenizer = weights.load(torch.float32)
        self.eos = self.tokenizer.eos_token_id
        self.model = HuggingFaceModel(self.net)
        self.cache = self.model.new_cache(64)
        self.prompt = prompts.conversation(self.tokenizer, prompts.QUESTIONS[0])
        self.examples = prompts.tokens(self.tokenizer, prompts.few_shot())

    def plain(
        self, copies: int = 1, prompt: Sequence[int] | None = None, **options: Any
    ) -> Decoded:
        self.net.set_attn_implementation("sdpa")
        torch.manual_seed(0)
        ends = {"eos_token_id": self.eos, "pad_token_id": self.eos}
        found = plain.generated(
            self.net, prompt or self.prompt, copies, max_new_tokens=TOKENS, **ends, **options
        )
        return found.without_padding([self.eos])


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    if not weights.installed():
        pytest.skip(f"the weights are not installed: {weights.INSTALL}")
    pytest.importorskip("tvm", reason="apache-tvm builds the module")
    with torch.inference_mode():
        yield Real()


def test_greedy_and_drafts_give_the_same_tokens(real: Real) -> None:
    wanted = real.plain(do_sample=False)
    control = greedy(eos=[real.eos], max_tokens=TOKENS)
    found, _ = ours.controlled(real.model, real.cache, real.prompt, control)
    assert found.texts == wanted.texts
    drafter = NGramDrafter(choices=EAGLE)
    options = {"max_tokens": TOKENS, "eos": [real.eos]}
    drafted = ours.drafted(real.model, real.cache, real.prompt, drafter, **options)
    assert drafted.texts == wanted.texts
    assert drafted.steps <= found.steps
    assert real.cache.bytes_in_use == 0


def test_samples_give_the_same_tokens_and_hold_the_prompt_once(real: Real) -> None:
    options = {"do_sample": True, "num_return_sequences": 4, "temperature": 0.8, "top_k": 50}
    wanted = real.plain(4, read_once=True, **options)
    torch.manual_seed(0)
    control = Sampling(4, temperature=0.8, top_k=50, eos=[real.eos], max_tokens=TOKENS)
    found = ours.samples(real.model, real.cache, real.prompt, control)
    assert found.texts == wanted.texts
    pages = real.cache.pages_for(len(real.prompt)) + 4 * 2
    assert 0 < found.kv_held <= pages * real.cache.bytes_per_page < wanted.kv_held


def test_beams_under_generate_give_the_same_tokens(real: Real) -> None:
    options = {"num_beams": 4, "num_return_sequences": 4}
    wanted = real.plain(prompt=real.examples, **options)
    ends = {"eos_token_id": real.eos, "pad_token_id": real.eos}
    found = ours.generated(real.net, real.examples, max_new_tokens=TOKENS, **ends, **options)
    assert found.without_padding([real.eos]).texts == wanted.texts
    assert found.kv_held < wanted.kv_held
    assert found.kv_read < wanted.kv_read


def test_a_draft_verified_by_a_dense_mask_has_the_logits_of_its_paths(real: Real) -> None:
    """The peer of benchmarks is right, too: each path by itself gives the same."""
    from transformers import DynamicCache

    clock = Clock()
    draft, parents = [5, 6, 7], [-1, 0, 0]
    with plain.on_the_clock(clock, real.net):
        cache = DynamicCache(config=real.net.config)
        real.net(torch.tensor([real.prompt]), past_key_values=cache, logits_to_keep=1)
        logits = plain.verify(real.net, cache, draft, parents)
        lies_at = [layer.keys.data_ptr() for layer in cache.layers]
        plain.keep(cache, len(real.prompt), [0, 2])
        assert [layer.keys.data_ptr() for layer in cache.layers] == lies_at
        after = real.net(torch.tensor([[8]]), past_key_values=cache).logits[0, -1]
        path = torch.tensor([[*real.prompt, 5, 7, 8]])
        wanted = real.net(path).logits[0]
    # Both sum 576 to 1536 products in float32 in another order, 30 layers deep.
    torch.testing.assert_close(logits[2], wanted[-2], rtol=0, atol=1e-3)
    torch.testing.assert_close(after, wanted[-1], rtol=0, atol=1e-3)
    assert 0 < clock.seconds["attention"] < clock.total


def test_missing_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    assert not weights.installed()
    with pytest.raises(DeftError, match=r"weights of SmolLM2 are not installed; expected `pip"):
        weights.load(torch.float32)


def test_a_drawing_tells_each_stretch_of_text_once() -> None:
    texts = [[1, 2, 3], [1, 2, 4, 5], [1, 6]]
    assert Forest.from_branches(texts)[0].num_nodes == 5
    told = drawing(texts, lambda tokens: "".join("abcdefg"[token] for token in tokens))
    assert told.splitlines() == [
        "1 tree: 5 nodes, 6 tokens, 3 rows",
        "b",
        "├─ c",
        "│  ├─ d",
        "│  └─ ef",
        "└─ g",
    ]


def test_a_clock_counts_a_part_inside_another_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 10.0, 11.0, 13.0, 16.0, 20.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.part("outer"), clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"inner": 2.0, "outer": 4.0}
    assert clock.total == 20.0


def test_texts_end_where_padding_begins() -> None:
    found = Decoded([[3, 1, 2, 2], [3, 4]], 2.0, 0, 0).without_padding([1, 2])
    assert found.texts == [[3, 1], [3, 4]]
    assert (found.tokens, found.per_second) == (4, 2.0)


def test_a_search_that_nobody_recorded_is_as_recorded_ones_are() -> None:
    tree = end_to_end.searched(prompt=7, levels=2, width=3, tokens=4)
    assert (tree.steps, tree.rows(1), tree.rows(8)) == (8, 3, 3)
    first, last = tree.at(4).forest, tree.at(8).forest
    assert (first.parents.tolist(), first.lengths.tolist()) == ([-1, 0, 0, 0], [7, 4, 4, 4])
    assert (last.parents.tolist(), last.lengths.tolist()) == ([-1, 0, 1, 1, 1], [7, 4, 4, 4, 4])
    assert Replay(tree).prompt_length == 7


def test_replaying_gives_the_same_tokens_as_a_row_for_each_branch(real: Real) -> None:
    tree = end_to_end.searched(prompt=len(real.prompt), levels=2, width=2, tokens=3)
    found, _ = ours.controlled(real.model, real.cache, real.prompt, Replay(tree))
    real.net.set_attn_implementation("sdpa")
    wanted = plain.replayed(real.net, tree.nodes, tree.parents, tree.steps, real.prompt)
    assert found.texts == wanted.texts and len(found.texts) == 2
    drafter = NGramDrafter(nodes=7)
    speculated = plain.speculated(real.net, real.prompt, drafter, TOKENS)
    drafted = ours.drafted(real.model, real.cache, real.prompt, drafter, max_tokens=TOKENS)
    assert speculated.texts == drafted.texts and speculated.steps == drafted.steps

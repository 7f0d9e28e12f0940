"""`HuggingFaceModel`: rows of trees through models of transformers, beside whole sequences."""

from __future__ import annotations

import pytest
import torch
from nudged import explained, sequence_logits
from tiny_models import FAMILIES, VOCABULARY, adapted, tiny, tokens
from torch import Tensor

from deft_tvm.decoding import BeamSearch, NGramDrafter, best, decode, greedy, speculate
from deft_tvm.integrations.huggingface import HuggingFaceModel
from deft_tvm.pool import ROOT
from deft_tvm.pytorch import PagedKVCache, Step

TEXT, BRANCHES = tokens(11), [tokens(n, seed=n) for n in (1, 3, 6)]
DRAFT, PARENTS = tokens(5, seed=7), [ROOT, 0, 0, ROOT, 2]


class Tree:
    """A model over a prompt, branches and a draft, and what it said of each token."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self.model = model
        self.cache: PagedKVCache = model.new_cache(32)

    def read(self, new: Tensor, step: Step) -> Tensor:
        return self.model(new, step, torch.arange(step.num_rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_tree_are_those_of_each_sequence(family: str) -> None:
    model = tiny(family)
    tree = Tree(adapted(model))
    pool = tree.cache.pool
    prompt = pool.root()
    found = [tree.read(TEXT, tree.cache.step({prompt: len(TEXT)}))]
    wanted = [sequence_logits(model, TEXT)]

    branches = [prompt, *pool.fork(prompt, 2)]
    step = tree.cache.step({b: len(t) for b, t in zip(branches, BRANCHES, strict=True)})
    found.append(tree.read(torch.cat(BRANCHES), step))
    wanted += [sequence_logits(model, torch.cat([TEXT, t]))[len(TEXT) :] for t in BRANCHES]

    step = tree.cache.step({branches[1]: 1}, {branches[2]: PARENTS})
    found.append(tree.read(torch.cat([DRAFT[:1], DRAFT]), step))
    paths = [[0], [0, 1], [0, 2], [3], [0, 2, 4]]
    texts = [torch.cat([TEXT, BRANCHES[1], DRAFT[:1]])]
    texts += [torch.cat([TEXT, BRANCHES[2], DRAFT[path]]) for path in paths]
    wanted += [sequence_logits(model, text)[-1:] for text in texts]

    error = float((torch.cat(found) - torch.cat(wanted)).abs().max())
    bound = explained(model, [TEXT, *texts])
    assert 0 < error <= bound
    # The bound is worth something: it is far below what another token would do.
    assert bound < 1e-2 * float(torch.cat(wanted).std())


def test_a_call_leaves_the_models_attention_as_it_was() -> None:
    model = tiny()
    tree = Tree(adapted(model))
    pool = tree.cache.pool
    for implementation in ("sdpa", "eager", "deft_tvm"):
        model.set_attn_implementation(implementation)
        tree.read(TEXT, tree.cache.step({pool.root(): len(TEXT)}))
        assert model.config._attn_implementation == implementation
    model.set_attn_implementation("sdpa")
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tree.read(TEXT, tree.cache.step({pool.root(): len(TEXT)}))
    assert model.config._attn_implementation == "sdpa"


def test_only_rows_to_keep_have_logits() -> None:
    model = tiny("deepseek_v3")
    tree = Tree(adapted(model))
    keep = torch.tensor([7, 2])
    step = tree.cache.step({tree.cache.pool.root(): len(TEXT)})
    found = tree.model(TEXT, step, keep)
    assert found.shape == (2, VOCABULARY)
    error = (found - sequence_logits(model, TEXT)[keep]).abs().max()
    assert error <= explained(model, [TEXT])


def test_a_model_in_16_bits() -> None:
    """Within what rounding to 16 bits in attention explains of transformers in the same dtype."""
    model = tiny().to(torch.bfloat16)
    tree = Tree(adapted(model))
    step = tree.cache.step({tree.cache.pool.root(): len(TEXT)})
    found = tree.read(TEXT, step)
    assert found.dtype is torch.bfloat16
    error = (found.float() - sequence_logits(model, TEXT).float()).abs().max()
    assert error <= explained(model, [TEXT])


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
def test_decoding_says_what_generate_says(family: str) -> None:
    model, prompts = tiny(family), [tokens(9).tolist(), tokens(5, seed=2).tolist()]
    adapter = adapted(model)
    cache = adapter.new_cache(64)
    for prompt, found in zip(
        prompts, decode(adapter, cache, prompts, greedy(max_tokens=8)), strict=True
    ):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=8)
        assert list(found.tokens) == wanted[0, len(prompt) :].tolist()

        beams = decode(adapter, cache, [prompt], BeamSearch(3, max_tokens=8))
        wanted = model.generate(ids, do_sample=False, num_beams=3, max_new_tokens=8)
        assert list(best(beams)[0][0].tokens) == wanted[0, len(prompt) :].tolist()

    speculated = speculate(adapter, cache, prompts, NGramDrafter(nodes=6), max_tokens=8)
    tokens_of = [decode(adapter, cache, [p], greedy(max_tokens=8))[0].tokens for p in prompts]
    assert [s.tokens for s in speculated] == tokens_of
    assert cache.bytes_in_use == 0

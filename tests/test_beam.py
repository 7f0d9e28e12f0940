"""Beam search finds what Hugging Face's `generate` finds, and what a full search does."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from decoded import TokenCache, cached, kv_cache, llama, over_tokens, random_logits, recomputed
from decoded import whole as whole_sequences

from deft_tvm.decoding import BeamSearch, Branch, Next, Shots, best, decode
from deft_tvm.errors import InputError

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "long": {"length_penalty": 2.0},
    "short": {"length_penalty": -1.0},
    "sums": {"length_penalty": 0.0, "early_stopping": "never"},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never", "length_penalty": 0.6},
    "never, means": {"early_stopping": "never"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("beams", "eos"), [(2, [3, 5, 8]), (3, []), (3, [3]), (4, [3, 5])])
@pytest.mark.parametrize("seed", range(12))
def test_results_are_those_of_generate(seed: int, beams: int, eos: list[int], rule: str) -> None:
    pytest.importorskip("transformers")
    model = llama(seed, 20)
    prompts = torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = model.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(3, 4, dtype=torch.int64),
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=9,
        eos_token_id=eos or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **RULES[rule],
    )
    search = BeamSearch(beams, eos=eos, max_tokens=9, **RULES[rule])
    branches = decode(over_tokens(recomputed(model)), TokenCache(200), prompts, search, chunk=7)
    found = [branch for group in best(branches, beams) for branch in group]
    assert len(found) == 3 * beams
    lengths = (expected.beam_indices >= 0).sum(1).tolist()
    for branch, row, length in zip(found, expected.sequences.tolist(), lengths, strict=True):
        assert [*prompts[branch.prompt], *branch.tokens] == row[: 4 + length]
    scores = torch.tensor([branch.score for branch in found])
    # Nine float32 logarithms of probabilities, of two ways to batch the same model.
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


def test_as_many_beams_as_sequences_find_the_best_of_all() -> None:
    table = random_logits(5, seed=1)
    sequences = list(product(range(5), repeat=3))
    scores = [
        sum(
            float(table([[2, *sequence[:end]]]).log_softmax(-1)[0, sequence[end]])
            for end in range(3)
        )
        for sequence in sequences
    ]
    expected = [sequences[place] for place in torch.tensor(scores).topk(6).indices.tolist()]
    # Any prefix of the best sequence is among the 25 best of its length: there are no more.
    search = BeamSearch(25, max_tokens=3, length_penalty=0.0)

    def control(live: Any, logits: Any) -> list[Next]:
        """The first steps have fewer candidates than the search wants."""
        wide = torch.cat([logits, logits.new_full((len(live), 60), -torch.inf)], 1)
        return [n for n in search(live, wide) if n.tokens[0] < 5]

    branches = decode(over_tokens(table), TokenCache(400), [[2]], control)
    assert [branch.tokens for branch in best(branches, 6)[0]] == expected


def test_over_a_real_cache_and_below_questions() -> None:
    """Each beam of a cache that splits and prunes is that of whole sequences."""
    prompt, questions = [5, 9, 1, 7, 3], [[2, 4], [11], [6, 6, 6]]
    search = BeamSearch(3, eos=[7, 21], max_tokens=8)
    shots = Shots(questions, search)
    cache = kv_cache()
    found = best(shots.answers(decode(cached, cache, [prompt], shots)), 3)
    whole = decode(
        over_tokens(whole_sequences),
        TokenCache(),
        [prompt + question for question in questions],
        search,
    )
    expected = best(whole, 3)
    assert [[b.tokens for b in group] for group in found] == [
        [b.tokens for b in group] for group in expected
    ]
    assert cache.pool.num_free == 64


def test_a_prompt_that_nothing_can_improve_is_pruned_while_others_go_on() -> None:
    """Token 0 ends at once below the first prompt only, and is nearly certain there."""
    ends = torch.tensor([[9.0, 0, 1, 0, 0], [-9.0, 0, 1, 0.5, 0]])
    live: list[list[int]] = []
    branches = decode(
        over_tokens(lambda sequences: torch.stack([ends[s[0]] for s in sequences])),
        TokenCache(),
        [[0], [1]],
        BeamSearch(2, eos=[0], max_tokens=6, early_stopping=True),
        observe=lambda step, now: live.append([branch.prompt for branch in now]),
    )
    assert live == [[0, 1], [0, 0, 1, 1], [1, 1], [1, 1], [1, 1], [1, 1]]
    assert [len(branch.tokens) for branch in best(branches, 2)[0]] == [1, 2]


def test_as_few_tokens_as_candidates_and_logits_of_16_bits() -> None:
    """Scores are sums in float32, whatever logits are."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    search = BeamSearch(3, max_tokens=4, eos=[1, 2])
    assert search.candidates == 9
    found = search([Branch(0)], logits)
    assert len(found) >= 3 and found == search([Branch(0)], logits.float())


@pytest.mark.parametrize(
    ("penalty", "kept", "goes_on"),
    [
        (-1.0, -3.5, True),
        (-1.0, -1.5, False),
        (1.0, -0.2, True),
        (0.0, -1.1, True),
        (0.0, -1, False),
    ],
)
def test_never_asks_what_a_beam_could_be_at_the_length_that_favours_it(
    penalty: float, kept: float, goes_on: bool
) -> None:
    """Two tokens of ten, a logarithm of -1: times 2 now, over 10 at the end, or as it is."""
    search = BeamSearch(1, max_tokens=10, eos=[0], length_penalty=penalty, early_stopping="never")
    beam = Branch(0, tokens=(1,), score=-1.0, state=(kept,))
    found = search([beam], torch.tensor([[0.0, 200.0]]))
    assert found == ([Next(0, (1,), -1.0, state=(kept,))] if goes_on else [])


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: BeamSearch(0, max_tokens=3), "beams is 0; expected 1 or more"),
        (lambda: BeamSearch(2, max_tokens=0), "max_tokens is 0; expected 1 or more"),
        (
            lambda: BeamSearch(2, max_tokens=1, early_stopping="always"),  # type: ignore[arg-type]
            "early_stopping is 'always'; expected True, False or 'never'",
        ),
        (
            lambda: BeamSearch(2, max_tokens=1, early_stopping=1),  # type: ignore[arg-type]
            "early_stopping is 1; expected True, False or 'never'",
        ),
        (
            lambda: BeamSearch(2, max_tokens=1, length_penalty=float("nan")),
            "length_penalty is nan; expected a finite number",
        ),
        (lambda: BeamSearch(1.5, max_tokens=1), "beams is 1.5; expected an integer"),  # type: ignore[arg-type]
        (lambda: BeamSearch(2, max_tokens=2.5), "max_tokens is 2.5; expected an integer"),  # type: ignore[arg-type]
        (
            lambda: BeamSearch(3, max_tokens=1, eos=[1, 2])([Branch(0)], torch.zeros(1, 8)),
            "beams is 3 with 2 eos and logits of 8 tokens; expected 9 or more of them",
        ),
    ],
)
def test_refusals(refused: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        refused()

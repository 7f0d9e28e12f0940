"""Speculation gives the tokens of greedy decoding, or samples of the model's own distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from decoded import TokenCache, Whole, cached, kv_cache, over_tokens, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_tvm.decoding import (
    Accepted,
    Branch,
    Draft,
    Lossless,
    NGramDrafter,
    Speculated,
    Warp,
    decode,
    greedy,
    match,
    speculate,
)
from deft_tvm.decoding.accept import residual
from deft_tvm.errors import InputError, OutOfPages, PageError

VOCABULARY = 8
TABLE = random_logits(VOCABULARY, seed=5)
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [4], [5, 6, 5, 6]]


def _greedy(function: Whole, tokens: Sequence[int], count: int) -> list[int]:
    """By definition, from whole sequences."""
    sequence = list(tokens)
    for _ in range(count):
        sequence.append(int(function([sequence]).argmax()))
    return sequence[len(tokens) :]


class Noisy:
    """A drafter of random trees, in which each token is right with some chance."""

    def __init__(self, function: Whole, seed: int, right: float) -> None:
        self.function, self.right = function, right
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Sequence[int]) -> Draft:
        count = int(torch.randint(7, (), generator=self.random))
        made: list[int] = []
        parents: list[int] = []
        paths = {-1: list(tokens)}
        for number in range(count):
            parent = int(torch.randint(-1, number, (), generator=self.random)) if number else -1
            guess = int(torch.randint(VOCABULARY, (), generator=self.random))
            if float(torch.rand((), generator=self.random)) < self.right:
                guess = _greedy(self.function, paths[parent], 1)[0]
            made.append(guess)
            parents.append(parent)
            paths[number] = [*paths[parent], guess]
        return Draft(made, parents)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    right=st.sampled_from([0.0, 0.5, 0.9]),
    page_size=st.sampled_from([1, 2, 8]),
    max_tokens=st.integers(1, 12),
    eos=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
)
def test_matching_drafts_gives_the_tokens_of_greedy_decoding(
    seed: int, right: float, page_size: int, max_tokens: int, eos: set[int]
) -> None:
    cache = TokenCache(400, page_size)
    drafter = Noisy(TABLE, seed, right)
    found = speculate(
        over_tokens(TABLE), cache, PROMPTS, drafter, max_tokens=max_tokens, eos=eos, chunk=3
    )
    for speculated, prompt in zip(found, PROMPTS, strict=True):
        expected = _greedy(TABLE, prompt, max_tokens)
        ends = [place for place, token in enumerate(expected) if token in eos]
        assert list(speculated.tokens) == expected[: ends[0] + 1 if ends else None]
        assert speculated.accepted <= speculated.drafted
        assert speculated.accepted + speculated.passes >= len(speculated.tokens)
    assert cache.pool.branches == []
    assert cache.pool.num_free == 400


@pytest.mark.parametrize(
    "drafter",
    [
        NGramDrafter(nodes=6),
        NGramDrafter(choices=[(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]),
        Draft.chain,
    ],
    ids=["best first", "choices", "the sequence itself"],
)
def test_and_so_over_a_real_cache(drafter: Callable[[Sequence[int]], Draft]) -> None:
    cache = kv_cache()
    found = speculate(cached, cache, PROMPTS, drafter, max_tokens=24)
    plain = decode(cached, kv_cache(), PROMPTS, greedy(max_tokens=24))
    assert [speculated.tokens for speculated in found] == [branch.tokens for branch in plain]
    assert sum(speculated.accepted for speculated in found) > 0
    assert cache.pool.num_free == 64


def test_a_drafter_that_is_always_right_saves_passes() -> None:
    def oracle(tokens: Sequence[int]) -> Draft:
        return Draft.chain(_greedy(TABLE, tokens, 3))

    rows: list[int] = []
    [found] = speculate(
        over_tokens(TABLE),
        TokenCache(),
        [[1, 2]],
        oracle,
        max_tokens=9,
        observe=lambda step, live: rows.append(step.num_rows),
    )
    assert found == Speculated(tuple(_greedy(TABLE, [1, 2], 9)), 3, 6, 6)
    assert found.tokens_per_pass == 3
    assert rows == [2, 4, 4]


def test_without_drafts_it_is_plain_decoding() -> None:
    found = speculate(
        over_tokens(TABLE), TokenCache(), PROMPTS, lambda tokens: Draft(), max_tokens=5
    )
    assert [f.passes for f in found] == [5, 5, 5]
    assert [f.tokens_per_pass for f in found] == [1, 1, 1]
    assert (
        speculate(over_tokens(TABLE), TokenCache(), [], NGramDrafter(nodes=1), max_tokens=2) == []
    )


def test_an_observer_sees_whose_drafts_a_step_has() -> None:
    seen: list[list[Branch]] = []
    eos = [_greedy(TABLE, PROMPTS[0], 1)[0]]
    speculate(
        over_tokens(TABLE),
        TokenCache(),
        PROMPTS,
        lambda tokens: Draft(),
        max_tokens=3,
        eos=eos,
        observe=lambda step, live: seen.append(list(live)),
    )
    assert [branch.prompt for branch in seen[0]] == [0, 1, 2]
    assert 0 not in [branch.prompt for branch in seen[1]]
    for step in seen[1:]:
        for branch in step:
            expected = _greedy(TABLE, PROMPTS[branch.prompt], len(branch.tokens))
            assert list(branch.tokens) == expected


def test_what_raises_leaves_the_cache_as_it_was() -> None:
    cache = TokenCache(4, 4)
    other = cache.pool.root()
    with pytest.raises(OutOfPages):
        speculate(
            over_tokens(TABLE), cache, [[1] * 9], lambda tokens: Draft.chain([0] * 8), max_tokens=9
        )

    def broken(tokens: Sequence[int]) -> Draft:
        raise RuntimeError("no draft")

    with pytest.raises(RuntimeError, match="no draft"):
        speculate(over_tokens(TABLE), cache, [[1], [2]], broken, max_tokens=9)
    assert cache.pool.branches == [other]
    assert cache.pool.num_free == 4


# --- samples ---------------------------------------------------------------------------------

SMALL = 4
COUNT = 6000
LENGTH = 3
BASE = random_logits(SMALL, seed=2, spread=1.0)


def _exact(function: Whole, prompt: Sequence[int], warp: Warp) -> dict[tuple[int, ...], float]:
    """Probability of every continuation."""
    result = {}
    for tokens in product(range(SMALL), repeat=LENGTH):
        rows = warp.probabilities(function([[*prompt, *tokens[:n]] for n in range(LENGTH)]))
        result[tokens] = math.prod(rows[range(LENGTH), list(tokens)].tolist())
    return result


def _surprise(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Pearson's χ², less what it stays below but once in a million times; rare cells are one.

    χ² of d degrees of freedom is more than d + 2 √(d t) + 2 t with probability at most exp(-t)
    (Laurent and Massart 2000, lemma 1).
    """
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    rare = [0.0, 0.0]
    for tokens, probability in exact.items():
        if probability * total >= 5:
            cells.append((probability * total, counts[tokens]))
        else:
            rare[0] += probability * total
            rare[1] += counts[tokens]
    if rare[0] >= 5:
        cells.append((rare[0], rare[1]))
    elif rare[0] == 0 and rare[1]:
        return math.inf
    degrees, t = len(cells) - 1, math.log(1e6)
    chi = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    return chi - (degrees + 2 * math.sqrt(degrees * t) + 2 * t)


class Drawn:
    """A drafter that draws trees of so many children a level from a model of its own."""

    def __init__(self, seed: int, widths: Sequence[int]) -> None:
        self.function = random_logits(SMALL, seed=seed, spread=1.5)
        self.widths = widths
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Sequence[int]) -> Draft:
        made: list[int] = []
        parents: list[int] = []
        rows: list[Tensor] = []
        level = [(-1, list(tokens))]
        for width in self.widths:
            below = []
            for parent, path in level:
                q = self.function([path]).softmax(-1)[0]
                for token in torch.multinomial(
                    q, width, replacement=True, generator=self.random
                ).tolist():
                    below.append((len(made), [*path, token]))
                    made.append(token)
                    parents.append(parent)
                    rows.append(q)
            level = below
        return Draft(made, parents, torch.stack(rows))


def _samples(drafter: Any, accept: Any) -> Counter[tuple[int, ...]]:
    prompts = [[1, 0, 1]] * (COUNT // 10)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(10):
        found = speculate(
            over_tokens(BASE), TokenCache(6000, 8), prompts, drafter, accept, max_tokens=LENGTH
        )
        counts.update(speculated.tokens for speculated in found)
    return counts


@pytest.mark.parametrize(
    ("drafter", "warp"),
    [
        (Drawn(7, [2, 2]), {}),
        (Drawn(8, [3]), {"temperature": 0.6}),
        (Drawn(9, [1, 1, 1]), {"top_k": 3}),
        (NGramDrafter(nodes=4), {}),
        (NGramDrafter(choices=[(0,), (1,), (0, 0)]), {"top_p": 0.8}),
    ],
    ids=["drawn tree", "drawn siblings", "drawn chain", "best first", "choices"],
)
def test_samples_have_the_models_distribution(drafter: Any, warp: dict[str, Any]) -> None:
    accept = Lossless(generator=torch.Generator().manual_seed(11), **warp)
    exact = _exact(BASE, [1, 0, 1], Warp(**warp))
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    assert _surprise(_samples(drafter, accept), exact) < 0


def test_the_statistic_sees_a_rule_that_is_not_lossless() -> None:
    """It forgets to take away from p what a drawn token had its chance with."""
    random = torch.Generator().manual_seed(11)

    def accept(draft: Draft, logits: Tensor) -> Accepted:
        path: list[int] = []
        last = -1
        while True:
            p = logits[last + 1].softmax(-1)
            for child in draft.children(last):
                token = draft.tokens[child]
                assert draft.probabilities is not None
                ratio = p[token] / draft.probabilities[child, token]
                if torch.rand((), generator=random) < ratio:
                    path.append(child)
                    last = child
                    break
            else:
                return Accepted(path, int(torch.multinomial(p, 1, generator=random)))

    exact = _exact(BASE, [1, 0, 1], Warp())
    assert _surprise(_samples(Drawn(7, [2, 2]), accept), exact) > 0


@given(
    weights=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=6
    ).filter(lambda pairs: all(sum(column) for column in zip(*pairs, strict=True)))
)
def test_what_is_kept_and_what_is_drawn_instead_add_up_to_the_models_distribution(
    weights: list[tuple[int, int]],
) -> None:
    """A token x is drawn with q(x) and kept with min(1, p(x) / q(x)), and so on: exactly p."""
    p, q = torch.tensor(weights, dtype=torch.float64).T
    p, q = p / p.sum(), q / q.sum()
    kept = torch.minimum(p, q)
    total = kept + (1 - kept.sum()) * residual(p, q)
    # Sums of six numbers up to 1, rounded once each; a difference of p and q is exact or as large.
    torch.testing.assert_close(total, p, rtol=0, atol=64 * 2**-53)


def test_certain_acceptance_is_matching() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    draft = Draft([best[0], (best[0] + 1) % 6, best[1]], [-1, -1, 0])
    assert match(draft, logits) == Accepted([0, 2], best[3])
    assert Lossless(temperature=0)(draft, logits) == Accepted([0, 2], best[3])


def test_a_draft_from_the_models_own_distribution_is_kept_whole() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    draft = Draft.chain([4, 2], logits[:2].softmax(-1))
    for seed in range(50):
        accept = Lossless(generator=torch.Generator().manual_seed(seed))
        assert accept(draft, logits).path == [0, 1]


def test_what_comes_after_the_end_is_not_accepted_and_what_has_ended_holds_no_page() -> None:
    model, prompts = over_tokens(TABLE), [[1, 2], [3, 4]]
    texts = [decode(model, TokenCache(), [p], greedy(max_tokens=20))[0].tokens for p in prompts]

    def right(tokens: Sequence[int]) -> Draft:
        (text,) = (t for p, t in zip(prompts, texts, strict=True) if tuple(p) == tokens[:2])
        return Draft.chain(text[len(tokens) - 2 :][:8])

    for length in (2, 5, 9):
        (found,) = speculate(model, TokenCache(), prompts[:1], right, max_tokens=length)
        assert found.tokens == texts[0][:length]
        assert (found.passes, found.drafted, found.accepted) == (2, 8, length - 1)

    eos = texts[0][0]
    held: list[list[int]] = []
    assert eos not in texts[1][:2]
    speculate(
        *(model, TokenCache(), prompts, right),
        max_tokens=2,
        eos=[eos],
        observe=lambda step, live: held.append(step.cache.pool.branches),  # type: ignore[attr-defined]
    )
    assert list(map(len, held)) == [2, 1]


# --- refusals --------------------------------------------------------------------------------


def _speculate(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"max_tokens": 3, "accept": match, **changes}
    drafter = arguments.pop("drafter", NGramDrafter(nodes=2))
    return speculate(over_tokens(TABLE), TokenCache(), [[1, 2]], drafter, **arguments)


@pytest.mark.parametrize(
    ("refused", "error", "words"),
    [
        (lambda: _speculate(max_tokens=0), InputError, "max_tokens is 0; expected 1 or more"),
        (lambda: _speculate(chunk=0), InputError, "chunk is 0; expected 1 or more rows"),
        (
            lambda: _speculate(accept=lambda draft, logits: Accepted([1, 0], 2)),
            PageError,
            r"path\[1\] is 2; expected a token of the draft below 0",
        ),
        (lambda: _speculate(max_tokens=2.5), InputError, "max_tokens is 2.5; expected an integer"),
        (lambda: _speculate(eos=3), InputError, "eos is 3; expected a collection of integers"),
        (
            lambda: _speculate(drafter=lambda tokens: None),
            InputError,
            "drafter returned NoneType; expected a Draft",
        ),
        (
            lambda: _speculate(
                drafter=lambda tokens: Draft([1], [-1], torch.ones(1, 2) / 2), accept=Lossless()
            ),
            InputError,
            r"probabilities of the draft are of 2 tokens; expected 8, as the model's logits",
        ),
        (lambda: Draft([1.5], [-1]), InputError, r"tokens is \[1.5\]; expected a collection"),
        *(
            (
                lambda row=row: Draft([1], [-1], torch.tensor([row])),
                InputError,
                r"probabilities\[0\] has the sum .* as the lowest; expected 1, and none below 0",
            )
            for row in ([1.0, 2.0], [-0.5, 1.5], [float("nan"), 1.0])
        ),
        (lambda: Draft([1, 2], [-1]), InputError, "parents has 1 entries; expected 2, as tokens"),
        (
            lambda: Draft([1, 2], [-1, 1]),
            InputError,
            r"parents\[1\] is 1; expected an earlier token, or -1",
        ),
        (
            lambda: Draft([1], [-1], torch.ones(2, 3)),
            InputError,
            r"probabilities has shape \(2, 3\); expected \(1, vocabulary\)",
        ),
        (
            lambda: Draft([1], [-1], torch.tensor([[1.0, 0.0]])),
            InputError,
            r"probabilities\[0, 1\] is 0.0; expected more than 0, as tokens\[0\] is 1",
        ),
        (lambda: Lossless(top_k=-2), InputError, "top_k is -2; expected 0 for all tokens"),
    ],
)
def test_refusals(refused: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        refused()


def test_tokens_of_a_draft_are_integers_whatever_they_came_in() -> None:
    draft = Draft.chain(torch.tensor([5, 6, 7]))
    assert draft.tokens == (5, 6, 7) and {type(token) for token in draft.tokens} == {int}

"""Decoding trees over the pool gives what whole sequences give, and leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoded import (
    TokenCache,
    cached,
    kv_cache,
    llama,
    over_tokens,
    random_logits,
    recomputed,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_tvm.decoding import (
    Branch,
    Decoding,
    Next,
    Sampling,
    Shots,
    Warp,
    best,
    decode,
    greedy,
)
from deft_tvm.errors import OutOfPages

PROMPTS = [[5, 9, 1, 7, 3, 3, 8], [2, 4], [11]]
VOCABULARY = 12
TABLE = random_logits(VOCABULARY)


class Checked:
    """A control of random decisions that holds the logits it is given to those of `function`.

    Each branch is pruned, waits, goes on, splits or ends, by up to three tokens.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], function: Any, seed: int) -> None:
        self.prompts, self.function = prompts, function
        self.random = torch.Generator().manual_seed(seed)
        self.ended: list[tuple[int, ...]] = []

    def _roll(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.random))

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        sequences = [[*self.prompts[branch.prompt], *branch.tokens] for branch in live]
        torch.testing.assert_close(logits, self.function(sequences), rtol=0, atol=1e-4)
        nexts = []
        for place, branch in enumerate(live):
            assert branch.state == (branch.tokens or None)
            for _ in range((0, 1, 1, 2, 3)[self._roll(5)]):
                new = tuple(self._roll(VOCABULARY) for _ in range(self._roll(4)))
                done = self._roll(8) == 0
                if done:
                    self.ended.append(branch.tokens + new)
                state = (branch.tokens + new) or None
                nexts.append(Next(place, new, len(state or ()), done, state))
        order = torch.randperm(len(nexts), generator=self.random).tolist()
        return [nexts[place] for place in order][:12]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), chunk=st.integers(1, 9), pages=st.sampled_from([1, 4, 16]))
def test_a_control_sees_the_logits_of_whole_sequences(seed: int, chunk: int, pages: int) -> None:
    cache = TokenCache(200, pages)
    control = Checked(PROMPTS, TABLE, seed)
    branches = decode(over_tokens(TABLE), cache, PROMPTS, control, 8, chunk=chunk)
    for branch in branches:
        assert branch.score == len(branch.tokens)
        assert branch.state == (branch.tokens or None)
        assert branch.done == (branch.number == -1)
    assert cache.pool.branches == []
    assert cache.pool.num_free == 200


@pytest.mark.parametrize("seed", range(4))
def test_and_so_over_a_real_cache(seed: int) -> None:
    cache = kv_cache(80)
    decode(cached, cache, PROMPTS, Checked(PROMPTS, whole, seed), 8, chunk=5)
    assert cache.pool.num_free == 80


def test_results_come_in_the_order_in_which_they_ended_then_what_is_live() -> None:
    script = iter(
        [
            [Next(1, (7,), 1.0, done=True), Next(0, (1,)), Next(0, (2, 3))],
            [Next(1, (), 2.0, done=True), Next(0, ()), Next(1, (4,), 3.0), Next(0, (5,))],
        ]
    )
    branches = decode(
        over_tokens(TABLE), TokenCache(), [[1], [2]], lambda live, logits: next(script), 2
    )
    assert [(b.prompt, b.tokens, b.score, b.done) for b in branches] == [
        (1, (7,), 1.0, True),
        (0, (2, 3), 2.0, True),
        (0, (1,), 0.0, False),
        (0, (2, 3, 4), 3.0, False),
        (0, (1, 5), 0.0, False),
    ]


def test_no_step_asks_nothing_and_returns_the_prompts() -> None:
    branches = decode(over_tokens(TABLE), TokenCache(), PROMPTS, greedy(), 0)
    assert [(branch.prompt, branch.tokens) for branch in branches] == [(0, ()), (1, ()), (2, ())]


def test_waiting_costs_no_row_and_gives_the_same_logits() -> None:
    seen, rows = [], []

    def control(live: Sequence[Branch], logits: Tensor) -> list[Next]:
        seen.append(logits)
        return [Next(0, ()), Next(1, (len(seen) + 3,))] if len(live) == 2 else [Next(0, (3,))] * 2

    decode(
        over_tokens(TABLE),
        TokenCache(),
        [[1, 2]],
        control,
        4,
        observe=lambda step, live: rows.append((step.num_rows, len(live))),
    )
    assert rows == [(2, 1), (2, 2), (1, 2), (1, 2)]
    assert torch.equal(seen[1][0], seen[3][0])
    assert not torch.equal(seen[1][1], seen[3][1])


def test_a_prompt_is_cached_once_for_all_below_it_and_in_chunks() -> None:
    cache, rows, used = TokenCache(64, 4), [], []

    def observe(step: Any, live: Sequence[Branch]) -> None:
        rows.append(step.num_rows)
        used.append(64 - cache.pool.num_free)

    decode(
        over_tokens(TABLE),
        cache,
        [[1] * 10, [2] * 5],
        Sampling(6, max_tokens=3, generator=torch.Generator().manual_seed(0)),
        chunk=6,
        observe=observe,
    )
    assert rows == [6, 6, 3, 6, 6, 6, 6]
    # Two prompts of three and two pages; one of each six goes on in the half-full page.
    assert used == [2, 3 + 1, 3 + 2, 3 + 5 + 2, 15, 15, 15]


def test_pruning_all_but_one_copies_no_more_than_a_page() -> None:
    cache, moved = TokenCache(64, 8), 0
    take = cache.pool.take_moves

    def counted() -> Any:
        nonlocal moved
        moves = take()
        moved += len(moves[0])
        return moves

    cache.pool.take_moves = counted  # type: ignore[method-assign]
    script = iter([[Next(0, (t,)) for t in range(4)], [Next(3, (1,))], [Next(0, (1,))]])
    decode(over_tokens(TABLE), cache, [[1] * 13], lambda live, logits: next(script), 3)
    assert moved == 13 % 8


def test_other_branches_of_the_cache_stay() -> None:
    cache = TokenCache()
    other = cache.pool.root()
    cache.step({other: 3}).write(torch.tensor([4, 5, 6]))
    decode(over_tokens(TABLE), cache, PROMPTS, Sampling(3), 5)
    assert cache.pool.branches == [other]
    assert cache.tokens[torch.from_numpy(cache.pool.slots(other))].tolist() == [4, 5, 6]


def test_a_control_that_raises_leaves_nothing_behind() -> None:
    cache = TokenCache()

    def control(live: Sequence[Branch], logits: Tensor) -> list[Next]:
        if len(live) > 3:
            raise KeyboardInterrupt
        return [Next(place, (1,)) for place in range(len(live)) for _ in range(2)]

    with pytest.raises(KeyboardInterrupt):
        decode(over_tokens(TABLE), cache, [[1, 2, 3]], control)
    assert cache.pool.branches == []
    assert cache.pool.num_free == 64


def test_a_model_that_raises_is_asked_again_for_the_same_rows() -> None:
    cache, asked = TokenCache(), []
    model = over_tokens(TABLE)

    def failing(tokens: Tensor, step: Any, keep: Tensor) -> Tensor:
        asked.append(tokens.tolist())
        if len(asked) == 2:
            raise RuntimeError("no more memory")
        return model(tokens, step, keep)

    with Decoding(failing, cache, [[1, 2, 3, 4, 5]], chunk=3) as decoding:
        with pytest.raises(RuntimeError):
            decoding.run()
        logits = decoding.run()
    assert asked == [[1, 2, 3], [4, 5], [4, 5]]
    assert torch.equal(logits, TABLE([[1, 2, 3, 4, 5]]))


def test_where_pages_are_lacking_a_decoding_goes_on_when_there_are_more() -> None:
    cache = TokenCache(3, 4)
    with Decoding(over_tokens(TABLE), cache, [[1] * 12]) as decoding:
        decoding.run()
        decoding.choose([Next(0, (1,)), Next(0, (2,))])
        lengths = [cache.pool.length(branch.number) for branch in decoding.live]
        with pytest.raises(OutOfPages, match="2 more pages are needed and 0 of num_pages=3"):
            decoding.run()
        assert [cache.pool.length(branch.number) for branch in decoding.live] == lengths == [12, 12]
        cache.resize(5)
        assert torch.equal(decoding.run(), TABLE([[1] * 12 + [1], [1] * 12 + [2]]))
    with pytest.raises(OutOfPages):
        decode(over_tokens(TABLE), cache, [[1] * 18], Sampling(3))
    assert cache.pool.num_free == 5


def test_greedy_takes_the_likeliest_token_of_each_whole_sequence() -> None:
    branches = decode(cached, kv_cache(), PROMPTS, greedy(max_tokens=12))
    for branch, prompt in zip(branches, PROMPTS, strict=True):
        sequence = list(prompt)
        for token in branch.tokens:
            assert token == int(whole([sequence]).argmax())
            sequence.append(token)
        assert len(branch.tokens) == 12
        assert branch.done


def test_scores_are_sums_of_log_probabilities() -> None:
    [branch] = decode(over_tokens(TABLE), TokenCache(), [[1]], Sampling(temperature=3.0), 5)
    sequence = [1, *branch.tokens]
    rows = TABLE([sequence[: end + 1] for end in range(5)]).log_softmax(-1)
    expected = rows[range(5), list(branch.tokens)].sum()
    # Five numbers below 16, each rounded a few times.
    assert branch.score == pytest.approx(float(expected), abs=5 * 16 * 2**-22)


def test_few_shot_questions_are_answered_as_if_each_was_a_prompt() -> None:
    questions, rows = [[1, 2, 3], [4], [5, 6]], []
    shots = Shots(questions, greedy(max_tokens=4, eos=[0]))
    branches = decode(
        over_tokens(TABLE),
        TokenCache(),
        PROMPTS[:2],
        shots,
        observe=lambda step, live: rows.append(step.num_rows),
    )
    alone = decode(
        over_tokens(TABLE),
        TokenCache(),
        [prompt + question for prompt in PROMPTS[:2] for question in questions],
        greedy(max_tokens=4, eos=[0]),
    )
    assert rows[:2] == [9, 2 * 6]
    answers = sorted(shots.answers(branches), key=lambda branch: branch.prompt)
    assert [(b.prompt, b.tokens) for b in answers] == sorted((b.prompt, b.tokens) for b in alone)
    assert all(b.tokens[: b.state.length] in [tuple(q) for q in questions] for b in branches)


def _padded(branches: Sequence[Branch], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """As `generate` returns them, its padding token 0 taken away."""
    return [[*prompts[b.prompt], *b.tokens] for b in branches]


def _generate(model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Sequences of `generate`, which pads with 0 up to the longest; 0 is none of their tokens."""
    out = model.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        pad_token_id=0,
        **settings,
    )
    return [[token for token in row if token] for row in out.tolist()]


class Without:
    """A control that is given logits in which a token is impossible."""

    def __init__(self, control: Any, token: int) -> None:
        self.control, self.token = control, token

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> Any:
        logits = logits.clone()
        logits[:, self.token] = -torch.inf
        return self.control(live, logits)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "warp",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_samples_are_those_of_generate(seed: int, warp: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    model = llama(seed, 20)
    prompts = torch.randint(1, 20, (2, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    torch.manual_seed(seed)
    expected = _generate(
        model,
        prompts,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=10,
        eos_token_id=[3, 8],
        bad_words_ids=[[0]],
        **{"top_k": 0, **warp},
    )
    sampling = Sampling(
        3, eos=[3, 8], max_tokens=10, generator=torch.Generator().manual_seed(seed), **warp
    )
    branches = decode(
        over_tokens(recomputed(model)), TokenCache(), prompts, Without(sampling, 0), chunk=7
    )
    rows = sorted(branches, key=lambda branch: branch.state.row)
    assert _padded(rows, prompts) == expected


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_that_of_generate(seed: int) -> None:
    pytest.importorskip("transformers")
    model = llama(seed, 20)
    prompts = [[4, 9, 2], [7, 7, 1]]
    expected = _generate(
        model, prompts, do_sample=False, max_new_tokens=10, eos_token_id=5, bad_words_ids=[[0]]
    )
    control = Without(greedy(eos=[5], max_tokens=10), 0)
    branches = decode(over_tokens(recomputed(model)), TokenCache(), prompts, control)
    rows = sorted(branches, key=lambda branch: branch.prompt)
    assert _padded(rows, prompts) == expected


def test_a_warp_leaves_out_by_its_definitions() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert Warp().probabilities(logits)[0].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    half = Warp(temperature=0.5).probabilities(logits)[0].tolist()
    assert half == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30])
    assert Warp(top_k=2).probabilities(logits)[0].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    nucleus = Warp(top_p=0.75).probabilities(logits)[0].tolist()
    assert nucleus == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert Warp(temperature=0).probabilities(logits)[0].tolist() == [0, 1, 0, 0]
    assert Warp(top_p=1e-6).probabilities(logits)[0].tolist() == [0, 1, 0, 0]


def test_best_are_results_by_score_for_each_prompt() -> None:
    branches = [
        Branch(2, (1,), 0.5, done=True),
        Branch(0, (2,), 1.0, done=True),
        Branch(0, (3,), 2.0, done=True),
        Branch(0, (4,), 9.0),
        Branch(0, (5,), 2.0, done=True),
    ]
    found = [[branch.tokens for branch in group] for group in best(branches, 2)]
    assert found == [[(3,), (5,)], [], [(1,)]]
    assert best([], 2) == []
    assert best([*branches, Branch(4)], 1)[3:] == [[], []], "for prompts without a result too"


@pytest.mark.parametrize("temperature", [1e-7, 1e-39, 1e-46])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[30.0, -2.0, 31.0, -torch.inf], [5e4, -1e5, 0.0, 4e4]])
    for warp in (Warp(temperature), Warp(temperature, top_k=2), Warp(temperature, top_p=0.5)):
        assert torch.equal(warp.probabilities(logits), torch.eye(4)[[2, 0]])

"""Tree of thoughts: what is proposed, what waits, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoded import TokenCache, over_tokens, random_logits

from deft_tvm.decoding import Branch, Shots, Thought, Thoughts, best, decode, greedy
from deft_tvm.decoding.warp import Warp
from deft_tvm.errors import InputError

TABLE = random_logits(10, seed=4, spread=1.0)
STOP, EOS = 0, 9
PROMPTS = [[1, 2, 3], [4]]


def _value(branch: Branch) -> float:
    return float(sum(branch.tokens) % 13)


class Search:
    """A search that notes what is evaluated, and the live branches of each step."""

    def __init__(self, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: Any) -> None:
        self.evaluated: list[list[Branch]] = []
        self.steps: list[tuple[int, list[Branch]]] = []
        arguments: dict[str, Any] = {
            "proposals": 3,
            "keep": 2,
            "depth": 3,
            "max_tokens": 5,
            "stop": [STOP],
            "eos": [EOS],
            "generator": torch.Generator().manual_seed(1),
            **changes,
        }
        self.thoughts = Thoughts(self.evaluate, **arguments)
        self.cache = TokenCache(300, 4)
        self.results = decode(
            over_tokens(TABLE),
            self.cache,
            prompts,
            self.thoughts,
            100,
            observe=lambda step, live: self.steps.append((step.num_rows, list(live))),
        )

    def evaluate(self, branches: Sequence[Branch]) -> list[float]:
        self.evaluated.append(list(branches))
        return [_value(branch) for branch in branches]


def _thought(branch: Branch) -> tuple[int, ...]:
    return branch.tokens[branch.state.begin :]


def test_thoughts_end_at_a_stop_or_their_longest_length() -> None:
    search = Search()
    assert search.evaluated
    for branches in search.evaluated:
        assert len({branch.prompt for branch in branches}) == 1
        for branch in branches:
            thought = _thought(branch)
            assert branch.state.complete
            assert STOP not in thought[:-1] and EOS not in thought[:-1]
            assert len(thought) == 5 or (thought[-1] in (STOP, EOS) and len(thought) < 5)
    lengths = {len(_thought(branch)) for branches in search.evaluated for branch in branches}
    assert len(lengths) > 2


def test_each_kept_thought_proposes_and_the_best_are_kept() -> None:
    search = Search()
    for prompt in (0, 1):
        rounds = [group for group in search.evaluated if group[0].prompt == prompt]
        kept: list[Branch] = [Branch(prompt)]
        for depth, group in enumerate(rounds, start=1):
            parents = [branch.tokens for branch in kept if branch.tokens[-1:] != (EOS,)]
            above = [branch.tokens[: branch.state.begin] for branch in group]
            assert above == [tokens for tokens in parents for _ in range(3)]
            assert {branch.state.depth for branch in group} == {depth}
            kept = sorted(group, key=_value, reverse=True)[:2]
            ended = [b for b in kept if depth == 3 or b.tokens[-1] == EOS]
            results = [r.tokens for r in search.results if r.prompt == prompt]
            assert {branch.tokens for branch in ended} <= set(results)
        assert len(rounds) <= 3


def test_results_have_their_values_and_the_cache_is_left_as_it_was() -> None:
    search = Search()
    assert all(branch.done for branch in search.results)
    assert [branch.score for branch in search.results] == [_value(b) for b in search.results]
    assert all(branch.state.depth == 3 or branch.tokens[-1] == EOS for branch in search.results)
    assert [len(group) for group in best(search.results, 9)] == [2, 2]
    assert search.cache.pool.num_free == 300


def test_a_thought_that_grows_has_the_value_of_the_one_above_it() -> None:
    seen = {
        (branch.score, _value(Branch(0, branch.tokens[: branch.state.begin])))
        for _, live in Search().steps
        for branch in live
        if branch.state is not None
    }
    assert len(seen) > 2 and all(score == above for score, above in seen)


def test_tokens_are_drawn_as_was_asked() -> None:
    asked = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    assert _thoughts(**asked).warp == Warp(**asked)


def test_complete_thoughts_wait_without_a_row() -> None:
    search = Search()
    before: dict[int, Branch] = {}
    waited = 0
    for rows, live in search.steps:
        waiting = [b for b in live if before.get(b.number) == b]
        waited += len(waiting)
        assert all(branch.state.complete for branch in waiting)
        before = {branch.number: branch for branch in live}
        if any(branch.tokens for branch in live):
            assert rows == len(live) - len(waiting)
    assert waited > 0


def test_a_lead_is_cached_once_for_all_thoughts_below_it() -> None:
    leads = {1: [7, 1], 2: [7, 2]}
    search = Search([[1, 2]], lead=lambda depth: leads[depth], depth=2, eos=[])
    live = [step for _, step in search.steps]
    assert [branch.tokens for branch in live[1]] == [(7, 1)]
    assert len(live[2]) == 3
    for branch in search.results:
        second = branch.state.begin
        assert branch.tokens[:2] == (7, 1)
        assert branch.tokens[second - 2 : second] == (7, 2)
    # Below each kept thought the lead is one branch's, until three are proposed.
    second_leads = [
        step for step in live if step[0].tokens[-2:] == (7, 2) and step[0].state.depth == 2
    ]
    assert [len(step) for step in second_leads] == [2]


def test_all_kept_thoughts_with_an_end_leave_nothing_to_go_on_with() -> None:
    search = Search([[1]], stop=[], eos=range(10))
    assert len(search.evaluated) == 1
    assert len(search.results) == 2
    assert all(len(branch.tokens) == 1 for branch in search.results)


def test_without_chance_one_thought_is_greedy() -> None:
    search = Search([[1, 2]], proposals=1, temperature=0, depth=2, stop=[], eos=[])
    [plain] = decode(over_tokens(TABLE), TokenCache(), [[1, 2]], greedy(max_tokens=10))
    assert [branch.tokens for branch in search.results] == [plain.tokens]


def test_thoughts_below_questions() -> None:
    seen: list[set[int]] = []

    def evaluate(branches: Sequence[Branch]) -> list[float]:
        seen.append({branch.prompt for branch in branches})
        return [_value(branch) for branch in branches]

    thoughts = Thoughts(evaluate, proposals=2, keep=1, depth=2, max_tokens=3)
    shots = Shots([[5, 6], [7]], thoughts)
    results = decode(over_tokens(TABLE), TokenCache(), [[1, 2]], shots)
    answers = shots.answers(results)
    assert sorted(branch.prompt for branch in answers) == [0, 1]
    assert all(len(group) == 1 for group in seen)
    assert all(branch.state == Thought(2, 3, True) for branch in answers)


def _thoughts(values: int = 1, **changes: Any) -> Thoughts:
    arguments: dict[str, Any] = {"proposals": 2, "keep": 1, "depth": 1, "max_tokens": 1}
    evaluate = changes.pop("evaluate", lambda branches: [1.0] * values)
    return Thoughts(evaluate, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        *(
            (lambda name=name: _thoughts(**{name: 0}), f"{name} is 0; expected 1 or more")
            for name in ("proposals", "keep", "depth", "max_tokens")
        ),
        (lambda: _thoughts(depth=1.5), "depth is 1.5; expected an integer"),
        (lambda: _thoughts(stop=3), "stop is 3; expected a collection of integers"),
        *(
            (
                lambda values=values: decode(
                    over_tokens(TABLE), TokenCache(), [[1]], _thoughts(evaluate=lambda _: values)
                ),
                r"evaluate returned .*; expected numbers, one for each thought",
            )
            for values in (None, [1.0, None], [float("nan"), 1.0])
        ),
        (lambda: _thoughts(temperature=0), "proposals is 2 with temperature 0, which makes them"),
        (lambda: _thoughts(top_p=2.0), "top_p is 2.0; expected more than 0 and at most 1"),
        (
            lambda: decode(over_tokens(TABLE), TokenCache(), [[1]], _thoughts()),
            "evaluate returned 1 values; expected 2, one for each thought",
        ),
        (
            lambda: decode(over_tokens(TABLE), TokenCache(), [[1]], _thoughts(values=3)),
            "evaluate returned 3 values; expected 2, one for each thought",
        ),
    ],
)
def test_refusals(refused: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        refused()

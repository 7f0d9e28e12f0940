"""What a decoding refuses, of callers, of controls and of models, and what it takes as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from decoded import TokenCache, over_tokens
from test_decoding import TABLE, VOCABULARY
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
from deft_tvm.errors import InputError


def _decode(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"control": greedy(max_tokens=2), "prompts": [[1, 2], [3]]}
    arguments |= changes
    model = arguments.pop("model", over_tokens(TABLE))
    return decode(model, TokenCache(), arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: _decode(prompts=[[1], []]), r"prompts\[1\] is empty; expected one token or more"),
        (lambda: _decode(chunk=0), "chunk is 0; expected 1 or more rows"),
        (lambda: _decode(chunk=1.5), "chunk is 1.5; expected an integer"),
        (lambda: _decode(max_steps=1.5), "max_steps is 1.5; expected an integer"),
        (lambda: _decode(prompts=[1, 2]), r"prompts\[0\] is 1; expected a collection of integers"),
        (lambda: _decode(prompts=["12"]), r"prompts\[0\] is '12'; expected a collection of int"),
        (lambda: _decode(prompts=[[1.5]]), r"prompts\[0\] is \[1.5\]; expected a collection of"),
        (lambda: _decode(control=lambda live, logits: None), "nexts is None; expected a Next for"),
        (
            lambda: _decode(control=lambda live, logits: [(0, (1,))]),
            r"nexts\[0\] is \(0, \(1,\)\); expected a Next",
        ),
        (
            lambda: _decode(model=lambda tokens, step, keep: None),
            "model returned NoneType; expected a torch.Tensor",
        ),
        *(
            (
                lambda value=value: _decode(
                    model=lambda tokens, step, keep: torch.full((2, VOCABULARY), value)
                ),
                "model returned logits that are NaN or infinite; expected numbers",
            )
            for value in (float("nan"), float("inf"))
        ),
        (lambda: _decode(max_steps=-1), "max_steps is -1; expected 0 or more, or None"),
        (
            lambda: _decode(control=lambda live, logits: [Next(0, (1,)), Next(2, (1,))]),
            r"nexts\[1\].parent is 2; expected the place of one of 2 live branches",
        ),
        (
            lambda: _decode(control=lambda live, logits: [Next(-1, (1,))]),
            r"nexts\[0\].parent is -1; expected the place of one of 2",
        ),
        (
            lambda: _decode(model=lambda tokens, step, keep: torch.zeros(3, VOCABULARY)),
            r"model returned logits of shape \(3, 12\); expected \(2, vocabulary\)",
        ),
        (lambda: Sampling(0), "samples is 0; expected 1 or more of each prompt"),
        (lambda: Sampling(max_tokens=0), "max_tokens is 0; expected 1 or more, or None"),
        (lambda: Sampling(1.5), "samples is 1.5; expected an integer"),
        (lambda: Sampling(max_tokens=2.5), "max_tokens is 2.5; expected an integer"),
        (lambda: greedy(eos=3), "eos is 3; expected a collection of integers"),
        (lambda: greedy(eos=[None]), r"eos is \[None\]; expected a collection of integers"),
        (lambda: Warp(top_k=2.5), "top_k is 2.5; expected an integer"),
        (lambda: Sampling(2, temperature=0), "samples is 2 with temperature 0, which makes"),
        (lambda: Sampling(temperature=-1.0), "temperature is -1.0; expected a number from 0 on"),
        (lambda: Warp(temperature=float("nan")), "temperature is nan; expected a number from 0"),
        (lambda: Warp(top_k=-1), "top_k is -1; expected 0 for all tokens, or how many"),
        (lambda: Warp(top_p=0.0), "top_p is 0.0; expected more than 0 and at most 1"),
        (lambda: Warp(top_p=1.5), "top_p is 1.5; expected more than 0 and at most 1"),
        (lambda: Shots([], greedy()), "questions is empty; expected one or more"),
        (lambda: Shots([[1], []], greedy()), r"questions\[1\] is empty; expected one token"),
        (lambda: Shots([1, 2], greedy()), r"questions\[0\] is 1; expected a collection of"),
        (lambda: best([], 1.5), "count is 1.5; expected an integer"),
        (lambda: best([], 0), "count is 0; expected 1 or more results for each prompt"),
    ],
)
def test_refusals(refused: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        refused()


def test_prompts_are_integers_whatever_they_came_in() -> None:
    for prompt in (torch.tensor([1, 2, 3]), np.array([1, 2, 3])):
        with Decoding(over_tokens(TABLE), TokenCache(), [prompt]) as decoding:
            assert all(type(token) is int for token in decoding.prompts[0])
            assert decoding.prompts == [(1, 2, 3)]


@pytest.mark.parametrize(
    "wrong",
    [
        Next(0, 3),
        Next(0, (2,), None),
        Next(0, ("a",)),
        Next(0, ("2",)),
        Next(0, (2.5,)),
        Next(0, (2,), float("nan")),
    ],
)
def test_a_choice_that_is_none_changes_nothing(wrong: Next) -> None:
    cache = TokenCache()
    with Decoding(over_tokens(TABLE), cache, [[1, 2, 3]]) as decoding:
        decoding.run()
        branches, free = cache.pool.branches, cache.pool.num_free
        with pytest.raises(InputError, match=r"nexts\[1\] has tokens .*; expected integers"):
            decoding.choose([Next(0, (1,)), wrong])
        assert (cache.pool.branches, cache.pool.num_free) == (branches, free)
        with pytest.raises(InputError, match=r"nexts\[0\].parent is 0.5; expected an integer"):
            decoding.choose([Next(0.5, (1,))])
        assert (cache.pool.branches, cache.pool.num_free) == (branches, free)
        decoding.choose(Next(0, (token,)) for token in (1, 2))
        assert len(decoding.live) == 2


def test_a_choice_and_its_ends_may_come_in_tensors() -> None:
    wanted = _decode(control=greedy(max_tokens=6))[0].tokens
    found = _decode(control=greedy(eos=torch.tensor(wanted[1:2]), max_tokens=6))
    assert next(branch.tokens for branch in found if branch.prompt == 0) == wanted[:2]

    def control(live: Sequence[Branch], logits: Tensor) -> list[Next]:
        return [Next(torch.tensor(1), torch.tensor([5, 6]), torch.tensor(0.5), done=True)]

    assert _decode(control=control) == [Branch(1, (5, 6), 0.5, done=True)]


def test_nothing_live_is_nothing_to_run() -> None:
    with Decoding(over_tokens(TABLE), TokenCache(), [[1]]) as decoding:
        decoding.choose([])
        with pytest.raises(InputError, match="live is empty; expected a branch or more to run"):
            decoding.run()


def test_prompts_without_a_question_have_no_answer() -> None:
    shots = Shots([[1]], greedy(max_tokens=1))
    assert shots.answers(_decode(control=shots, max_steps=0)) == []

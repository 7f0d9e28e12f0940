"""Drafts by n-grams are those of a count by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.decoding import Draft, NGramDrafter
from deft_tvm.errors import InputError, TreeError


def _probabilities(text: Sequence[int], path: Sequence[int], context: int) -> dict[int, float]:
    """Witten and Bell's, by the definition, of what follows text and path."""
    result = {token: n / len(text) for token, n in Counter(text).items()}
    whole = [*text, *path]
    for length in range(1, context + 1):
        suffix = whole[-length:]
        seen = Counter(
            text[end]
            for end in range(length, len(text))
            if list(text[end - length : end]) == suffix
        )
        if len(suffix) < length or not seen:
            break
        total, kinds = sum(seen.values()), len(seen)
        result = {t: (seen[t] + kinds * p) / (total + kinds) for t, p in result.items()}
    return result


def _paths(draft: Draft) -> list[tuple[int, ...]]:
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for token, parent in enumerate(draft.parents):
        paths[token] = (*paths[parent], draft.tokens[token])
    return [paths[token] for token in range(len(draft.tokens))]


def _reached(text: Sequence[int], path: Sequence[int], context: int) -> float:
    return math.prod(
        _probabilities(text, path[:end], context)[path[end]] for end in range(len(path))
    )


texts = st.lists(st.integers(0, 4), min_size=1, max_size=25)


@settings(max_examples=80)
@given(text=texts, nodes=st.integers(1, 12), context=st.integers(1, 4))
def test_best_first_drafts_are_the_likeliest_paths(
    text: list[int], nodes: int, context: int
) -> None:
    paths = _paths(NGramDrafter(nodes=nodes, context=context)(text))
    assert len(paths) == len(set(paths)) == nodes
    reached = [_reached(text, path, context) for path in paths]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(reached))
    # Nothing that could have been next is likelier than what was taken last.
    offered = {(*path, token) for path in [(), *paths] for token in text} - set(paths)
    likeliest = max((_reached(text, path, context) for path in offered), default=0.0)
    assert likeliest <= reached[-1] * (1 + 1e-12)


@settings(max_examples=80)
@given(text=texts, context=st.integers(1, 4))
def test_choices_are_ranks_of_continuations(text: list[int], context: int) -> None:
    choices = [(0,), (1,), (0, 0), (0, 2), (2,), (0, 0, 1), (2, 0)]
    paths = iter(_paths(NGramDrafter(choices=choices, context=context)(text)))
    made: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for choice in sorted(choices, key=len):
        if choice[:-1] not in made or choice[-1] >= len(set(text)):
            continue
        path = next(paths)
        made[choice] = path
        assert path[:-1] == made[choice[:-1]]
        chances = _probabilities(text, path[:-1], context)
        ranked = sorted(chances.values(), reverse=True)
        assert chances[path[-1]] == pytest.approx(ranked[choice[-1]], rel=1e-12)
    assert next(paths, None) is None


def test_equally_likely_tokens_come_by_how_late_they_were() -> None:
    assert NGramDrafter(choices=[(0,), (1,), (2,)])([7, 5, 6]).tokens == (6, 5, 7)


def test_a_text_that_repeats_is_foreseen() -> None:
    """The longest context decides, where it was seen."""
    text = [1, 2, 3, 9, 5, 2, 3, 8, 5, 2, 3, 8, 1, 2, 3]
    draft = NGramDrafter(nodes=3, context=3)(text)
    assert _paths(draft)[0] == (9,)
    assert NGramDrafter(nodes=1, context=2)(text).tokens == (8,)


def test_unlikely_tokens_are_not_drafted() -> None:
    text = [1, 2, 3, 4, 5, 6] * 4
    draft = NGramDrafter(nodes=50, least=0.9)(text)
    assert 1 <= len(draft.tokens) < 50
    assert all(_reached(text, path, 3) >= 0.9 for path in _paths(draft))
    assert NGramDrafter(nodes=50, least=0.99)([1, 2]).tokens == ()
    # Half of a text that never goes on from its end is likely enough, if half is asked for.
    assert NGramDrafter(nodes=50, least=0.5)([1, 2]).tokens == (2, 1)


@pytest.mark.parametrize(
    ("refused", "error", "words"),
    [
        (lambda: NGramDrafter(), InputError, "nodes is None and choices is None; expected one"),
        (
            lambda: NGramDrafter(nodes=2, choices=[(0,)]),
            InputError,
            "nodes is 2 and choices is not None; expected one of them",
        ),
        (lambda: NGramDrafter(nodes=2.5), InputError, "nodes is 2.5; expected an integer"),
        (
            lambda: NGramDrafter(nodes=2, context=1.5),
            InputError,
            "context is 1.5; expected an integer",
        ),
        (lambda: NGramDrafter(nodes=0), InputError, "nodes is 0; expected 1 or more"),
        (lambda: NGramDrafter(nodes=2, context=0), InputError, "context is 0; expected 1 or more"),
        (
            lambda: NGramDrafter(nodes=2, least=1.0),
            InputError,
            "least is 1.0; expected a probability less than 1",
        ),
        (
            lambda: NGramDrafter(nodes=2, least=-0.1),
            InputError,
            "least is -0.1; expected a probability less than 1",
        ),
        (
            lambda: NGramDrafter(choices=[(0,), ()]),
            TreeError,
            r"choices\[1\] is \(\); expected every path once, none of them empty",
        ),
        (
            lambda: NGramDrafter(choices=[(0,), (0, -1)]),
            InputError,
            r"choices\[1\] is \(0, -1\); expected ranks of children, from 0 on",
        ),
        (
            lambda: NGramDrafter(choices=[(0,), (1, 0)]),
            TreeError,
            r"choices\[1\] is \(1, 0\); expected its prefix \(1,\) as a choice",
        ),
    ],
)
def test_refusals(refused: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        refused()

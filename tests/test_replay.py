"""A replayed tree has in each step the forest that was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoded import TokenCache, cached, kv_cache, over_tokens, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.decoding import Branch, Replay, decode
from deft_tvm.errors import InputError
from deft_tvm.tree import Forest
from deft_tvm.workloads.recorded import Node, RecordedTree

TABLE = random_logits(9)

Shape = tuple[int, int, tuple[Any, ...]]
"""Tokens, rows, and what is below, in an order of its own."""


def shape(forest: Forest) -> list[Shape]:
    """A forest up to the order of its nodes, and up to cuts where nothing branches."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(forest.parents.tolist()):
        children.setdefault(parent, []).append(node)

    def below(node: int) -> list[Shape]:
        """Of a node without tokens what is below it, and nothing of one without rows below."""
        own, rows = int(forest.lengths[node]), int(forest.rows[node])
        inner = [found for child in children.get(node, []) for found in below(child)]
        if not rows and len(inner) == 1:
            [(tokens, count, rest)] = inner
            return [(own + tokens, count, rest)]
        if own == 0:
            return inner
        return [(own, rows, tuple(sorted(inner)))] if rows or inner else []

    return sorted(found for root in children[-1] for found in below(root))


@st.composite
def trees(draw: st.DrawFn) -> RecordedTree:
    """A prompt, and nodes that begin where their parents end, some of them without tokens."""
    nodes = [Node(0, 5, -4, draw(st.sampled_from([0, 0, 2])), [])]
    parents = [-1]
    for number in range(1, draw(st.integers(2, 14))):
        parent = draw(st.integers(0, number - 1))
        start = nodes[parent].end + 1
        length = draw(st.integers(0 if number > 1 else 1, 4))
        nodes.append(Node(number, length, start, start + length - 1, []))
        parents.append(parent)
    return RecordedTree("a tree", tuple(nodes), tuple(parents))


def _replay(tree: RecordedTree, model: Any, cache: Any, **steps: int) -> tuple[list[int], Any]:
    """Steps that were compared, and what `decode` returned."""
    replay = Replay(tree, **steps)
    compared: list[int] = []

    def observe(step: Any, live: Sequence[Branch]) -> None:
        at = {branch.state.step for branch in live if branch.state}
        if len(at) == 1 and min(at) >= replay.first:
            [now] = at
            compared.append(now)
            assert step.num_rows == len(live) == tree.rows(now)
            assert shape(step.forest) == shape(tree.at(now).forest)
            assert len({(branch.prompt, branch.tokens) for branch in live}) == len(live)

    prompt = list(range(replay.prompt_length))
    return compared, decode(model, cache, [prompt], replay, observe=observe)


@settings(max_examples=150)
@given(tree=trees(), page_size=st.sampled_from([1, 4]))
def test_all_steps(tree: RecordedTree, page_size: int) -> None:
    cache = TokenCache(400, page_size)
    compared, results = _replay(tree, over_tokens(TABLE), cache)
    assert compared == list(range(1, tree.steps + 1))
    assert len(results) == tree.rows(tree.steps)
    assert all(branch.done for branch in results)
    assert cache.pool.num_free == 400


@settings(max_examples=150)
@given(tree=trees(), data=st.data())
def test_a_range_of_steps(tree: RecordedTree, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, tree.steps))
    last = data.draw(st.integers(first, tree.steps))
    compared, results = _replay(tree, over_tokens(TABLE), TokenCache(400), first=first, last=last)
    assert compared == list(range(first, last + 1))
    assert len(results) == tree.rows(last)


def test_over_a_real_cache_with_the_models_likeliest_tokens() -> None:
    nodes = (
        Node(0, 6, -5, 0, []),
        Node(1, 2, 1, 2, []),
        Node(2, 1, 1, 1, []),
        Node(3, 2, 3, 4, []),
    )
    tree = RecordedTree("a tree", nodes, (-1, 0, 0, 1))
    compared, [result] = _replay(tree, cached, kv_cache())
    assert compared == [1, 2, 3, 4]
    assert len(result.tokens) == 4


def test_siblings_take_the_likeliest_tokens_by_rank() -> None:
    nodes = (Node(0, 2, -1, 0, []), *(Node(n, 1, 1, 1, []) for n in range(1, 5)))
    tree = RecordedTree("a tree", nodes, (-1, 0, 0, 0, 0))
    results = decode(over_tokens(TABLE), TokenCache(), [[0, 1]], Replay(tree))
    expected = TABLE([[0, 1]])[0].argsort(descending=True)[:4].tolist()
    assert [branch.tokens for branch in results] == [(token,) for token in expected]
    assert torch.equal(torch.tensor(sorted(expected)), torch.tensor(expected).unique())


TREE = RecordedTree("a tree", (Node(0, 3, -2, 0, []), Node(1, 4, 1, 4, [])), (-1, 0))
LATE = RecordedTree("a tree", (Node(0, 3, -2, 0, []), Node(1, 4, 2, 5, [])), (-1, 0))
BARE = RecordedTree("a tree", (Node(0, 3, 1, 3, []), Node(1, 4, 4, 7, [])), (-1, 0))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: Replay(TREE, first=0), "first is 0 and last is 4; expected steps from 1 to 4"),
        (lambda: Replay(TREE, first=3, last=2), "first is 3 and last is 2; expected steps from 1"),
        (lambda: Replay(TREE, last=5), "first is 1 and last is 5; expected steps from 1 to 4"),
        (lambda: Replay(TREE, last=1.5), "last is 1.5; expected an integer"),  # type: ignore[arg-type]
        (lambda: Replay(LATE), "node 1 begins in step 2; expected 1, the step after its parent's"),
        (lambda: Replay(BARE), "prompt has 0 tokens before step 1; expected 1 or more"),
    ],
)
def test_refusals(refused: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        refused()

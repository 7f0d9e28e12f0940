"""The tree that was decoded, with its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deft_tvm.show.text import tree
from deft_tvm.tree import Forest

WIDEST = 61
CUT = 30
MOST_CHILDREN = 16


def drawing(texts: Sequence[Sequence[int]], decode: Callable[[list[int]], str]) -> str:
    """A line for each stretch of text, those that go on from it below.

    Args:
        texts: tokens of each sequence.
        decode: from tokens to text.
    """
    forest, ends = Forest.from_branches(texts)
    own: dict[int, list[int]] = {}
    for text, end in zip(texts, ends.tolist(), strict=True):
        node = end
        while node >= 0:
            begin = int(forest.start[node])
            own[node] = list(text[begin : begin + int(forest.lengths[node])])
            node = int(forest.parents[node])

    def label(node: int) -> str:
        told = decode(own[node]).replace("\n", "⏎")
        return told if len(told) <= WIDEST else "…".join((told[:CUT], told[-CUT:]))

    return tree(forest, label, MOST_CHILDREN)

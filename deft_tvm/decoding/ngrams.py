"""Drafts from the text itself: what followed the last tokens where they stood before.

Needs no second model. Works where a text repeats itself: code, quotations, summaries, structured
data (prompt lookup; Saxena 2023).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import whole
from deft_tvm.decoding.drafts import Draft
from deft_tvm.errors import InputError
from deft_tvm.pool import ROOT
from deft_tvm.tree import Forest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class NGramDrafter:
    """Draft trees of likely continuations, by counts of n-grams of the sequence so far.

    The probability of a continuation is that of Witten and Bell (1991), from the longest context
    that was seen before down to none: with n occurrences of a context, t different tokens after
    it and c times this one, ``(c + t · shorter) / (n + t)``, where `shorter` is the probability
    in the context without its first token.
    """

    def __init__(
        self,
        *,
        nodes: int | None = None,
        choices: Sequence[Sequence[int]] | None = None,
        context: int = 3,
        least: float = 0.0,
    ) -> None:
        """A tree that grows where it is likely, or one of fixed shape.

        Args:
            nodes: best first: so many tokens, those that are reached with the highest probability.
            choices: instead, paths of child ranks, as `deft_tvm.Forest.from_choices` takes them:
                rank r is the (r + 1)-th likeliest continuation. What does not exist is left out.
            context: tokens that are compared at most.
            least: with `nodes`: no token that is reached with less probability.

        Raises:
            InputError: both or neither of `nodes` and `choices`, or a number is out of range.
            TreeError: `choices` is no tree.
        """
        if (nodes is None) == (choices is None):
            raise InputError(
                f"nodes is {nodes} and choices is {'not ' if choices is not None else ''}None; "
                "expected one of them"
            )
        if nodes is not None and whole("nodes", nodes, InputError) < 1:
            raise InputError(f"nodes is {nodes}; expected 1 or more")
        if whole("context", context, InputError) < 1:
            raise InputError(f"context is {context}; expected 1 or more tokens")
        if not 0 <= least < 1:
            raise InputError(f"least is {least}; expected a probability less than 1")
        for place, choice in enumerate(choices or ()):
            if min(choice, default=0) < 0:
                raise InputError(
                    f"choices[{place}] is {tuple(choice)}; expected ranks of children, from 0 on"
                )
        if choices is not None:
            Forest.from_choices(choices, context=1)
            choices = sorted((tuple(choice) for choice in choices), key=len)
        self.nodes, self.choices = nodes, choices
        self.context, self.least = context, least

    def __call__(self, tokens: Sequence[int]) -> Draft:
        """See `Drafter`."""
        root = _Context.of(_Text(tokens), self.context)
        return self._likeliest(root) if self.choices is None else self._chosen(root)

    def _chosen(self, root: _Context) -> Draft:
        """The choices that exist."""
        assert self.choices is not None
        tokens: list[int] = []
        parents: list[int] = []
        made: dict[tuple[int, ...], tuple[int, _Context]] = {(): (ROOT, root)}
        for choice in map(tuple, self.choices):
            number, context = made.get(choice[:-1], (ROOT, None))
            if context is not None and choice[-1] < len(context.ranked):
                place = int(context.ranked[choice[-1]])
                made[choice] = (len(tokens), context.after(place))
                tokens.append(int(context.text.distinct[place]))
                parents.append(number)
        return Draft(tokens, parents)

    def _likeliest(self, root: _Context) -> Draft:
        """The tokens that are reached with the highest probabilities."""
        tokens: list[int] = []
        parents: list[int] = []
        contexts = {ROOT: root}
        waiting: list[tuple[float, int, int, float]] = []

        def offer(parent: int, rank: int, reached: float) -> None:
            """Its children come in the order of their ranks, so one of them waits at a time."""
            context = contexts[parent]
            if rank < len(context.ranked):
                probability = reached * float(context.probabilities[context.ranked[rank]])
                if probability >= self.least:
                    heapq.heappush(waiting, (-probability, parent, rank, reached))

        offer(ROOT, 0, 1.0)
        while waiting and len(tokens) < (self.nodes or 0):
            negative, parent, rank, reached = heapq.heappop(waiting)
            place = int(contexts[parent].ranked[rank])
            contexts[len(tokens)] = contexts[parent].after(place)
            tokens.append(int(root.text.distinct[place]))
            parents.append(parent)
            offer(len(tokens) - 1, 0, -negative)
            offer(parent, rank + 1, reached)
        return Draft(tokens, parents)


class _Text:
    """The sequence so far.

    Attributes:
        distinct: its tokens, each once.
        ids: int64[tokens], of each its place in `distinct`.
        last: of each distinct token where it came last.
        shares: of each distinct token its share of the text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.distinct, self.ids = np.unique(np.asarray(tokens, np.int64), return_inverse=True)
        self.last = np.zeros(len(self.distinct), np.int64)
        self.last[self.ids] = np.arange(len(self.ids))
        self.shares: Floats = np.bincount(self.ids) / max(len(self.ids), 1)


class _Context:
    """The last tokens of a sequence, drafted ones among them, and where they stood before.

    Attributes:
        text: without what is drafted.
        found: for each length from 0 on, the positions in the text before which the last so many
            tokens stand.
    """

    def __init__(self, text: _Text, found: list[Ints], most: int) -> None:
        self.text, self.found, self._most = text, found, most

    @classmethod
    def of(cls, text: _Text, most: int) -> _Context:
        """The end of the text itself, with at most so many tokens."""
        context = cls(text, [np.arange(len(text.ids))], most)
        for place in text.ids[-most:].tolist():
            context = context.after(place)
        return context

    def after(self, place: int) -> _Context:
        """The context that a distinct token is added to."""
        ids = self.text.ids
        longer = [at[ids[at] == place] + 1 for at in self.found[: self._most]]
        return _Context(
            self.text, [self.found[0], *(at[at < len(ids)] for at in longer)], self._most
        )

    @cached_property
    def probabilities(self) -> Floats:
        """Of each distinct token the probability to follow."""
        text, result = self.text, self.text.shares
        for at in self.found[1:]:
            counts = np.bincount(text.ids[at], minlength=len(text.distinct))
            kinds = np.count_nonzero(counts)
            if kinds == 0:
                break
            result = (counts + kinds * result) / (len(at) + kinds)
        return result

    @cached_property
    def ranked(self) -> Ints:
        """Places of distinct tokens, the likeliest first, of equally likely ones the latest."""
        return np.lexsort((-self.text.last, -self.probabilities))

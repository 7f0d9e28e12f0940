"""Samples of each prompt, independent of each other; greedy decoding where nothing is random."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.decoding.branch import Branch, Next
from deft_tvm.decoding.given import tokens_of
from deft_tvm.decoding.warp import Warp
from deft_tvm.errors import InputError


class Sample(NamedTuple):
    """The state of a branch of `Sampling`.

    Attributes:
        row: its number among all samples, those of the first prompt first.
        rows: samples of all prompts, ended ones too.
    """

    row: int
    rows: int


class Sampling:
    """A control that splits each prompt into samples, from which tokens are drawn until they end.

    Each step makes one draw for all samples in their order, those that have ended included, so the
    tokens are those of Hugging Face's ``generate(do_sample=True, num_return_sequences=samples)``
    with the same logits, seed and settings (its `top_k` is 50 by default). A sample's score is the
    sum of the log-probabilities that the model itself gave its tokens: self-consistency and
    best-of-n choose by it, or by the answers.

    It remembers nothing by itself and may serve any number of decodings.
    """

    def __init__(
        self,
        samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: Collection[int] = (),
        max_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Samples until one of `eos` comes, which they keep, or they are `max_tokens` long.

        Args:
            samples: of each prompt.
            temperature, top_k, top_p: see `Warp`; with temperature 0 the most likely token is
                taken, and nothing is drawn.
            eos: tokens that end a sample.
            max_tokens: tokens of a sample at most; by default as many as it has steps.
            generator: where randomness comes from, on the device of the logits; by default
                torch's own.

        Raises:
            InputError: a number is out of range, or there are several samples and no chance.
        """
        if whole("samples", samples, InputError) < 1:
            raise InputError(f"samples is {samples}; expected 1 or more of each prompt")
        if max_tokens is not None and whole("max_tokens", max_tokens, InputError) < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected 1 or more, or None")
        self.samples, self.max_tokens, self.generator = samples, max_tokens, generator
        self.eos = frozenset(tokens_of("eos", eos))
        self.warp = Warp(temperature, top_k, top_p)
        self.warp.check_several("samples", samples)

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        """See `deft_tvm.decoding.Control`."""
        parents, states = self._samples(live)
        scores = logits.float()
        tokens = self._draw(scores, parents, states)
        gained = scores[parents, tokens] - scores.logsumexp(-1)[parents]
        return [
            Next(
                parent,
                (token,),
                live[parent].score + gain,
                token in self.eos or len(live[parent].tokens) + 1 == self.max_tokens,
                state,
            )
            for parent, token, gain, state in zip(
                parents, tokens.tolist(), gained.tolist(), states, strict=True
            )
        ]

    def _samples(self, live: Sequence[Branch]) -> tuple[list[int], list[Sample]]:
        """Of each sample the place of the branch that it goes on, and its state."""
        if isinstance(live[0].state, Sample):
            return list(range(len(live))), [branch.state for branch in live]
        rows = len(live) * self.samples
        return (
            [place for place in range(len(live)) for _ in range(self.samples)],
            [Sample(row, rows) for row in range(rows)],
        )

    def _draw(self, scores: Tensor, parents: list[int], states: list[Sample]) -> Tensor:
        """int64, a token for each sample."""
        if self.warp.certain:
            return scores.argmax(-1)[parents]
        probabilities = self.warp.probabilities(scores)
        rows = [state.row for state in states]
        # Rows that have ended draw as well, whatever: what the others draw depends on it.
        every = probabilities.new_ones(states[0].rows, probabilities.shape[-1])
        every[rows] = probabilities[parents]
        return torch.multinomial(every, 1, generator=self.generator)[rows, 0]


def greedy(*, eos: Collection[int] = (), max_tokens: int | None = None) -> Sampling:
    """One sample of each prompt, always the most likely token; of equal ones the first.

    Args:
        eos: tokens that end it.
        max_tokens: tokens at most; by default as many as there are steps.

    Raises:
        InputError: `max_tokens` is less than 1.
    """
    return Sampling(temperature=0.0, eos=eos, max_tokens=max_tokens)

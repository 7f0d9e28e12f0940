"""Which of a draft's tokens are kept: those that the model would have chosen itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deft_tvm.decoding.drafts import Draft
from deft_tvm.decoding.warp import Warp
from deft_tvm.errors import InputError
from deft_tvm.pool import ROOT


class Accepted(NamedTuple):
    """What one pass adds to a sequence.

    Attributes:
        path: numbers of the draft's tokens that are kept, each the parent of the next.
        token: what follows them, the model's own choice.
    """

    path: list[int]
    token: int


Accept = Callable[[Draft, Tensor], Accepted]
"""From a draft and logits ``[1 + tokens, vocabulary]`` to what is kept. Row 0 is what follows the
sequence, row i + 1 what follows the draft's token i."""


def match(draft: Draft, logits: Tensor) -> Accepted:
    """Keep what greedy decoding gives: the likeliest tokens, of equally likely ones the first."""
    wanted = logits.float().argmax(-1).tolist()
    path: list[int] = []
    last = ROOT
    while True:
        token = wanted[last + 1]
        fitting = (child for child in draft.children(last) if draft.tokens[child] == token)
        last = next(fitting, ROOT)
        if last == ROOT:
            return Accepted(path, token)
        path.append(last)


class Lossless:
    """Keep tokens at random so that results are distributed as the model's own samples.

    Of the tokens after a parent, one after another is kept with probability
    ``min(1, p(x) / q(x))``, p the model's distribution and q that from which x was drawn. Where it
    is not, p becomes what p has more than q, ``max(0, p - q)`` normalised, and the next one is
    tried; where none is kept, a token is drawn from what p has become (Leviathan et al. 2023, Chen
    et al. 2023; for trees Miao et al. 2024, SpecInfer, algorithm 2). A token that was chosen, not
    drawn, has q(x) = 1.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """The distribution of results.

        Args:
            temperature, top_k, top_p: p is the model's distribution after these, see `Warp`.
            generator: where randomness comes from, on the device of the logits; by default
                torch's own.

        Raises:
            InputError: a number is out of range.
        """
        self.warp, self.generator = Warp(temperature, top_k, top_p), generator

    def __call__(self, draft: Draft, logits: Tensor) -> Accepted:
        """See `Accept`.

        Raises:
            InputError: the draft's distributions are over another vocabulary.
        """
        given = draft.probabilities
        if given is not None and given.shape[1] != logits.shape[1]:
            raise InputError(
                f"probabilities of the draft are of {given.shape[1]} tokens; expected "
                f"{logits.shape[1]}, as the model's logits"
            )
        path: list[int] = []
        last = ROOT
        while True:
            p = self.warp.probabilities(logits[last + 1, None])[0].double()
            kept, p = self._first_kept(draft, last, p)
            if kept == ROOT:
                return Accepted(path, int(torch.multinomial(p, 1, generator=self.generator)))
            path.append(kept)
            last = kept

    def _first_kept(self, draft: Draft, parent: int, p: Tensor) -> tuple[int, Tensor]:
        """A child that is kept, or `ROOT` and the distribution to draw from instead."""
        for child in draft.children(parent):
            token, q = draft.tokens[child], torch.zeros_like(p)
            if draft.probabilities is None:
                q[token] = 1
            else:
                q += draft.probabilities[child].to(q.device)
            chance = torch.rand((), dtype=p.dtype, device=p.device, generator=self.generator)
            rest = residual(p, q)
            # Where nothing is left, p is q but for rounding.
            if chance * q[token] < p[token] or not rest.any():
                return child, p
            p = rest
        return ROOT, p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What the distribution p has more than q, as a distribution; all 0 where that is nothing."""
    more = (p - q).clamp(min=0)
    return more / more.sum().clamp(min=torch.finfo(more.dtype).tiny)

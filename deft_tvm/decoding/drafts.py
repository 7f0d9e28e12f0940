"""Drafts: small trees of tokens that somebody guesses and one pass of the model verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deft_tvm.decoding.given import tokens_of
from deft_tvm.errors import InputError
from deft_tvm.pool import ROOT

SUM_ERROR = 2**-7
"""What the sum of a distribution may miss of 1: twice the rounding of its elements to bfloat16."""


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that may follow a sequence.

    Attributes:
        tokens: in any order in which parents come before their children.
        parents: of each token the number of the token before it, -1 after the sequence itself.
        probabilities: ``[tokens, vocabulary]``, of each token the distribution that it was drawn
            from, independently of the others after the same parent; None where the tokens were
            not drawn but chosen.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises:
        InputError: tokens are no integers, the arrays do not fit each other, a parent is no earlier
            token, or a token was drawn from what is no distribution or does not have it.
        """
        for name in ("tokens", "parents"):  # of a tensor each would be a tensor, equal to none
            object.__setattr__(self, name, tokens_of(name, getattr(self, name)))
        count = len(self.tokens)
        if len(self.parents) != count:
            raise InputError(
                f"parents has {len(self.parents)} entries; expected {count}, as tokens"
            )
        for token, parent in enumerate(self.parents):
            if not ROOT <= parent < token:
                raise InputError(
                    f"parents[{token}] is {parent}; expected an earlier token, or {ROOT}"
                )
        if self.probabilities is None:
            return
        if self.probabilities.dim() != 2 or len(self.probabilities) != count:
            raise InputError(
                f"probabilities has shape {tuple(self.probabilities.shape)}; expected ({count}, "
                "vocabulary), a distribution for each token"
            )
        sums = self.probabilities.sum(-1, dtype=torch.float32)
        lowest = self.probabilities.amin(-1)
        for token, (total, low) in enumerate(zip(sums.tolist(), lowest.tolist(), strict=True)):
            if not (low >= 0 and abs(total - 1) <= SUM_ERROR):
                raise InputError(
                    f"probabilities[{token}] has the sum {total:.4g} and {low:.4g} as the lowest; "
                    "expected 1, and none below 0"
                )
        for token, value in enumerate(self.tokens):
            chance = float(self.probabilities[token, value])
            if not chance > 0:
                raise InputError(
                    f"probabilities[{token}, {value}] is {chance}; expected more than 0, as "
                    f"tokens[{token}] is {value}"
                )

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Tensor | None = None) -> Draft:
        """Tokens one after another, as drafters without trees make them."""
        return cls(tokens, range(-1, len(tokens) - 1), probabilities)

    def children(self, parent: int) -> list[int]:
        """Numbers of the tokens after a token, or after the sequence where `parent` is -1."""
        return [token for token, above in enumerate(self.parents) if above == parent]


class Drafter(Protocol):
    """Any callable from a sequence to a draft of what follows."""

    def __call__(self, tokens: Sequence[int], /) -> Draft:
        """A draft below the last of `tokens`, which are prompt and answer as far as they are known.

        A draft without tokens makes the step one of plain decoding.
        """
        ...

"""A few-shot workload from a real text, a token a byte.

The prompt is the first half of the Declaration of Independence of 1776, which is in the public
domain; the branches are passages of its second half, of mixed lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

PROMPT_TOKENS = 4000
BRANCHES = 32
SHORTEST, LONGEST = 16, 96


@dataclass(frozen=True)
class FewShot:
    """One prompt and what follows it in each branch.

    Attributes:
        prompt: int64[tokens].
        branches: int64[tokens] each.
    """

    prompt: Tensor
    branches: tuple[Tensor, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each branch."""
        return [len(branch) for branch in self.branches]


def few_shot(
    prompt: int = PROMPT_TOKENS,
    branches: int = BRANCHES,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
) -> FewShot:
    """The text's first `prompt` bytes, and passages of what comes after, spread evenly over it."""
    text = resources.files(__package__).joinpath("declaration.txt").read_bytes()
    tokens = torch.tensor(list(text))
    stride = (len(text) - longest - prompt) // branches
    spread = longest - shortest + 1
    # A step that shares no factor with most spreads mixes long and short branches.
    lengths = [shortest + 37 * branch % spread for branch in range(branches)]
    begins = [prompt + stride * branch for branch in range(branches)]
    passages = (tokens[b : b + n] for b, n in zip(begins, lengths, strict=True))
    return FewShot(tokens[:prompt], tuple(passages))

"""Branches of a decoding, and what a control says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.errors import InputError


@dataclass(frozen=True, slots=True)
class Branch:
    """A sequence that goes on, or has ended, below one of the prompts.

    Attributes:
        prompt: place of its prompt in the prompts that were decoded.
        tokens: what follows the prompt.
        score: as the control gave it; 0 at first.
        state: whatever the control wants to know again; None at first.
        done: it is a result: nothing follows, and nothing of it is cached.
        number: its branch in the cache's pool while it is live; -1 when it is done.
    """

    prompt: int
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    state: Any = None
    done: bool = False
    number: int = -1


class Next(NamedTuple):
    """What becomes of a live branch.

    A branch with no `Next` is pruned, with one it goes on, with several it splits into as many.

    Attributes:
        parent: its place among the live branches.
        tokens: what follows; several are appended in one step. With none the branch waits, at no
            cost, and its logits come again.
        score: of the branch with these tokens.
        done: the sequence ends with these tokens and is kept as a result.
        state: of the branch with these tokens.
    """

    parent: int
    tokens: Sequence[int]
    score: float = 0.0
    done: bool = False
    state: Any = None


Control = Callable[[Sequence[Branch], Tensor], Sequence[Next]]
"""From the live branches, and ``[live, vocabulary]`` logits of what follows each of them, to what
becomes of them. The next live branches come in the order of these `Next`."""


def best(branches: Sequence[Branch], count: int = 1) -> list[list[Branch]]:
    """For each prompt its results with the highest scores, the best first.

    Args:
        branches: what `deft_tvm.decoding.decode` returned; those that are not done are left out.
        count: at most so many for each prompt.

    Returns:
        One list for each prompt up to the last that has a branch; of equal scores the earlier
        result comes first.

    Raises:
        InputError: `count` is less than 1.
    """
    if whole("count", count, InputError) < 1:
        raise InputError(f"count is {count}; expected 1 or more results for each prompt")
    found: list[list[Branch]] = [
        [] for _ in range(max((b.prompt for b in branches), default=-1) + 1)
    ]
    for branch in branches:
        if branch.done:
            found[branch.prompt].append(branch)
    return [sorted(group, key=lambda b: -b.score)[:count] for group in found]

"""Few-shot batches: many questions below one prompt, which is cached once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from deft_tvm.decoding.branch import Branch, Control, Next
from deft_tvm.decoding.given import tokens_of
from deft_tvm.errors import InputError


class Shot(NamedTuple):
    """The state of a branch of `Shots`.

    Attributes:
        question: its number; those below the first prompt come first.
        length: tokens of the question.
        state: of the control that answers.
    """

    question: int
    length: int
    state: Any = None


class Shots:
    """A control that puts questions below each prompt in one step, and lets another one answer.

    To the other control each question is a prompt, and the answer what follows it. So questions of
    a batch are beams, samples or whatever, and share the KV of the prompt.
    """

    def __init__(self, questions: Sequence[Sequence[int]], control: Control) -> None:
        """Questions, and who answers them.

        Args:
            questions: tokens of each, at least one; all are put below each of the prompts.
            control: is asked from the step after them on.

        Raises:
            InputError: there is no question, or one is empty or not of integers.
        """
        self.questions = [tokens_of(f"questions[{i}]", each) for i, each in enumerate(questions)]
        self.control = control
        if not self.questions:
            raise InputError("questions is empty; expected one or more")
        for place, question in enumerate(self.questions):
            if not question:
                raise InputError(f"questions[{place}] is empty; expected one token or more")

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        """See `deft_tvm.decoding.Control`."""
        if not isinstance(live[0].state, Shot):
            return [
                Next(place, tokens, state=Shot(place * len(self.questions) + number, len(tokens)))
                for place in range(len(live))
                for number, tokens in enumerate(self.questions)
            ]
        nexts = self.control(self.answers(live), logits)
        return [n._replace(state=live[n.parent].state._replace(state=n.state)) for n in nexts]

    def answers(self, branches: Sequence[Branch]) -> list[Branch]:
        """The branches as the other control sees them: `prompt` is the question's number.

        Args:
            branches: what `deft_tvm.decoding.decode` returned, or live ones; prompts that no
                question was put below yet are left out.
        """
        return [
            replace(
                branch,
                prompt=branch.state.question,
                tokens=branch.tokens[branch.state.length :],
                state=branch.state.state,
            )
            for branch in branches
            if isinstance(branch.state, Shot)
        ]

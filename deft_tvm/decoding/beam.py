"""Beam search."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.decoding.branch import Branch, Next
from deft_tvm.decoding.given import tokens_of
from deft_tvm.errors import InputError

Scores = tuple[float, ...]
"""The best final scores of a prompt until now, the highest first: the state of its branches."""


class BeamSearch:
    """A control that goes on with the likeliest sequences of each prompt.

    A beam's running score is the sum of its tokens' log-probabilities, a result's score is that
    divided by ``tokens ** length_penalty``. Results are those of Hugging Face's
    ``generate(num_beams=beams)`` with the same logits: after `decode`, take them by
    ``best(branches, count)``.

    It remembers nothing by itself and may serve any number of decodings.
    """

    def __init__(
        self,
        beams: int,
        *,
        max_tokens: int,
        eos: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        """A search that ends where no beam can improve the results.

        Args:
            beams: sequences that go on, and results that are kept, for each prompt.
            max_tokens: tokens of a result at most; beams that get there are results too.
            eos: tokens that end a sequence.
            length_penalty: see above; above 0 it favours long results.
            early_stopping: when a prompt with `beams` results is ended. True: at once. False: when
                the best beam, as it is now, would not be among them. "never": when it would not
                be at the length that favours it most.

        Raises:
            InputError: an argument is out of range.
        """
        if whole("beams", beams, InputError) < 1:
            raise InputError(f"beams is {beams}; expected 1 or more")
        if whole("max_tokens", max_tokens, InputError) < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected 1 or more")
        if not math.isfinite(length_penalty):
            raise InputError(f"length_penalty is {length_penalty}; expected a finite number")
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise InputError(
                f"early_stopping is {early_stopping!r}; expected True, False or 'never'"
            )
        self.beams, self.max_tokens = beams, max_tokens
        self.eos = frozenset(tokens_of("eos", eos))
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        # A beam may end in as many ways as there are `eos`: enough candidates are left that go on.
        self.candidates = max(2, 1 + len(self.eos)) * beams

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        """See `deft_tvm.decoding.Control`.

        Raises:
            InputError: the vocabulary has fewer tokens than a step has candidates.
        """
        if logits.shape[-1] < self.candidates:
            raise InputError(
                f"beams is {self.beams} with {len(self.eos)} eos and logits of "
                f"{logits.shape[-1]} tokens; expected {self.candidates} or more of them"
            )
        groups: dict[int, list[int]] = {}
        for place, branch in enumerate(live):
            groups.setdefault(branch.prompt, []).append(place)
        log_probabilities = logits.float().log_softmax(-1)
        return [
            following
            for places in groups.values()
            for following in self._prompt(live, places, log_probabilities[places])
        ]

    def _prompt(
        self, live: Sequence[Branch], places: list[int], log_probabilities: Tensor
    ) -> list[Next]:
        """What becomes of one prompt's beams."""
        branches = [live[place] for place in places]
        before = log_probabilities.new_tensor([branch.score for branch in branches])
        totals, found = (log_probabilities + before[:, None]).flatten().topk(self.candidates)
        length = len(branches[0].tokens) + 1
        final = (totals / length**self.length_penalty).tolist()
        running: list[Next] = []
        ended: list[Next] = []
        for rank, (total, where) in enumerate(zip(totals.tolist(), found.tolist(), strict=True)):
            beam, token = divmod(where, log_probabilities.shape[-1])
            if token not in self.eos and length < self.max_tokens:
                running.append(Next(places[beam], (token,), total))
            elif rank < self.beams:
                ended.append(Next(places[beam], (token,), final[rank], done=True))
        scores: Scores = branches[0].state or ()
        kept = sorted([*scores, *(n.score for n in ended)], reverse=True)[: self.beams]
        results = [following for following in ended if following.score >= kept[-1]]
        if length == self.max_tokens or self._is_over(
            kept, totals.new_tensor(running[0].score), length
        ):
            return results
        return results + [n._replace(state=tuple(kept)) for n in running[: self.beams]]

    def _is_over(self, kept: list[float], best: Tensor, length: int) -> bool:
        """Whether no running beam is given the chance to improve the results.

        Args:
            kept: scores of the results.
            best: float32, running score of the best beam.
            length: tokens that it has.
        """
        if len(kept) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return float(best / length**self.length_penalty) <= kept[-1]

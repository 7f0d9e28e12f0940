"""Tree of thoughts, searched in breadth (Yao et al. 2023, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.decoding.branch import Branch, Next
from deft_tvm.decoding.given import tokens_of
from deft_tvm.decoding.warp import Warp
from deft_tvm.errors import InputError


@dataclass(frozen=True, slots=True)
class Thought:
    """The state of a branch of `Thoughts`: the thought at its end.

    Attributes:
        depth: thoughts on the path, this one included.
        begin: it is ``branch.tokens[begin:]``.
        complete: nothing is added to it; the branch waits for the others, or goes on below it.
    """

    depth: int
    begin: int
    complete: bool = False


Evaluate = Callable[[Sequence[Branch]], Sequence[float]]
"""From the complete thoughts of one prompt, each the end of a branch, to a value for each: the
higher, the better. It may ask a model of its own, or let thoughts vote."""


class Thoughts:
    """A control that proposes thoughts, values them, and goes on below the best ones.

    Below each kept thought so many are proposed by sampling, each until a token of `stop` or its
    longest length. Those that are complete wait. When all of a prompt are, `evaluate` values them,
    the best are kept, the others pruned. Thoughts that are kept at the last depth are results, and
    so are those that end with a token of `eos`; they have their value as score. A thought that
    grows has the value of the one above it.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        proposals: int,
        keep: int,
        depth: int,
        max_tokens: int,
        stop: Collection[int] = (),
        eos: Collection[int] = (),
        lead: Callable[[int], Sequence[int]] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """A search.

        Args:
            evaluate: see `Evaluate`.
            proposals: thoughts below each one that is kept.
            keep: so many are kept for each prompt, at every depth.
            depth: thoughts on the path of a result at most.
            max_tokens: tokens of a thought at most.
            stop: tokens that end a thought, which keeps them.
            eos: tokens that end a thought and the sequence.
            lead: from a depth, 1 at first, to tokens that are put before its thoughts, once for
                all proposals: "Step 2:".
            temperature, top_k, top_p: see `Warp`.
            generator: where randomness comes from, on the device of the logits; by default
                torch's own.

        Raises:
            InputError: a number is out of range, or there are several proposals and no chance.
        """
        for name, number in (
            ("proposals", proposals),
            ("keep", keep),
            ("depth", depth),
            ("max_tokens", max_tokens),
        ):
            if whole(name, number, InputError) < 1:
                raise InputError(f"{name} is {number}; expected 1 or more")
        self.evaluate = evaluate
        self.proposals, self.keep, self.depth = proposals, keep, depth
        self.max_tokens = max_tokens
        self.eos = frozenset(tokens_of("eos", eos))
        self.stop = self.eos | frozenset(tokens_of("stop", stop))
        self.lead, self.generator = lead, generator
        self.warp = Warp(temperature, top_k, top_p)
        self.warp.check_several("proposals", proposals)

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        """See `deft_tvm.decoding.Control`.

        Raises:
            InputError: `evaluate` did not return a number for each thought.
        """
        groups: dict[int, list[int]] = {}
        for place, branch in enumerate(live):
            groups.setdefault(branch.prompt, []).append(place)
        nexts = [
            following
            for places in groups.values()
            for following in self._prompt([(place, live[place]) for place in places])
        ]
        return self._drawn(live, nexts, logits)

    def _prompt(self, branches: list[tuple[int, Branch]]) -> list[Next]:
        """What becomes of one prompt's branches; no tokens where one is to be drawn."""
        if branches[0][1].state is None:
            return [n for place, branch in branches for n in self._below(place, branch, 0.0)]
        if all(branch.state.complete for _, branch in branches):
            return self._evaluated(branches)
        nexts = []
        for place, branch in branches:
            is_new = len(branch.tokens) == branch.state.begin
            following = Next(place, (), branch.score, state=branch.state)
            nexts += [following] * (self.proposals if is_new else 1)
        return nexts

    def _evaluated(self, branches: list[tuple[int, Branch]]) -> list[Next]:
        """The best thoughts end, or have others below them."""
        values = _numbers(self.evaluate([branch for _, branch in branches]), len(branches))
        ranked = sorted(range(len(values)), key=lambda i: -values[i])[: self.keep]
        nexts = []
        for (place, branch), value in ((branches[i], values[i]) for i in ranked):
            if branch.state.depth == self.depth or branch.tokens[-1] in self.eos:
                nexts.append(Next(place, (), value, done=True, state=branch.state))
            else:
                nexts += self._below(place, branch, value)
        return nexts

    def _below(self, place: int, branch: Branch, value: float) -> list[Next]:
        """The beginnings of thoughts below a kept one, or below the prompt."""
        depth = 1 + (branch.state.depth if branch.state else 0)
        lead = tuple(self.lead(depth)) if self.lead else ()
        following = Next(place, lead, value, state=Thought(depth, len(branch.tokens) + len(lead)))
        return [following] * (1 if lead else self.proposals)

    def _drawn(self, live: Sequence[Branch], nexts: list[Next], logits: Tensor) -> list[Next]:
        """The same, with a token drawn for each thought that grows."""
        growing = [
            place
            for place, following in enumerate(nexts)
            if not (following.tokens or following.done or following.state.complete)
        ]
        if not growing:
            return nexts
        rows = logits[[nexts[place].parent for place in growing]]
        if self.warp.certain:
            tokens = rows.float().argmax(-1)
        else:
            chances = self.warp.probabilities(rows)
            tokens = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
        for place, token in zip(growing, tokens.tolist(), strict=True):
            following = nexts[place]
            thought = following.state
            length = len(live[following.parent].tokens) + 1 - thought.begin
            complete = token in self.stop or length == self.max_tokens
            state = Thought(thought.depth, thought.begin, complete)
            nexts[place] = following._replace(tokens=(token,), state=state)
        return nexts


def _numbers(values: Sequence[float], count: int) -> list[float]:
    """What `evaluate` returned for so many thoughts; of NaN none is the higher."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if any(map(math.isnan, numbers)):
        raise InputError(f"evaluate returned {values!r}; expected numbers, one for each thought")
    if len(numbers) != count:
        raise InputError(
            f"evaluate returned {len(numbers)} values; expected {count}, one for each thought"
        )
    return numbers

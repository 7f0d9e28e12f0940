"""Speculative decoding: a draft tree below each sequence is verified by one pass of the model.

The newest token, which follows from the pass before and is not cached yet, is the root of the tree,
so a pass gives at least one new token and never repeats work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from deft_tvm.arrays import whole
from deft_tvm.decoding.accept import Accept, match
from deft_tvm.decoding.branch import Branch
from deft_tvm.decoding.drafts import Draft, Drafter
from deft_tvm.decoding.given import tokens_of
from deft_tvm.decoding.loop import Decoding, Observe, logits_of
from deft_tvm.decoding.model import Model
from deft_tvm.errors import InputError
from deft_tvm.pool import ROOT
from deft_tvm.pytorch import PagedKVCache


@dataclass(frozen=True)
class Speculated:
    """What was decoded below one prompt.

    Attributes:
        tokens: what follows the prompt.
        passes: of the model that gave them, the prompt's counted as one; without drafts there are
            as many as tokens.
        drafted: tokens of all drafts.
        accepted: those of them that were kept.
    """

    tokens: tuple[int, ...]
    passes: int
    drafted: int
    accepted: int

    @property
    def tokens_per_pass(self) -> float:
        """1 where no draft was of use."""
        return len(self.tokens) / self.passes


@dataclass
class _Sequence:
    """The sequence of a prompt of some number while it grows; its last token is not cached yet."""

    number: int
    branch: int
    prompt: tuple[int, ...]
    tokens: list[int]
    passes: int = 1
    drafted: int = 0
    accepted: int = 0

    def has_ended(self, eos: Collection[int], max_tokens: int) -> bool:
        return self.tokens[-1] in eos or len(self.tokens) == max_tokens

    def result(self) -> Speculated:
        return Speculated(tuple(self.tokens), self.passes, self.drafted, self.accepted)


def speculate(
    model: Model,
    cache: PagedKVCache,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter,
    accept: Accept = match,
    *,
    max_tokens: int,
    eos: Collection[int] = (),
    chunk: int = 1024,
    observe: Observe | None = None,
) -> list[Speculated]:
    """Decode one sequence below each prompt, with the drafts of all of them in one pass.

    The cache is left as it was, also where this ends by an exception.

    Args:
        model: see `deft_tvm.decoding.Model`.
        cache: of the model's layers; it may hold other branches.
        prompts: tokens of each, at least one.
        drafter: guesses what follows a sequence.
        accept: what is kept of it: `match` for exactly the tokens of greedy decoding, a `Lossless`
            for samples of exactly the model's distribution.
        max_tokens: tokens of a result at most.
        eos: tokens that end a sequence, which keeps them.
        chunk: at most so many rows of prompts run through the model at once.
        observe: is shown each step after the model ran, and the branches in it, without the tokens
            of their drafts.

    Returns:
        For each prompt what follows it, and how often the model ran for that.

    Raises:
        InputError: a prompt is empty, `max_tokens` or `chunk` is out of range, or the model or the
            drafter returned something that does not fit.
        OutOfPages: the cache has too few pages; drafts need theirs until they are verified.
    """
    if whole("max_tokens", max_tokens, InputError) < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected 1 or more")
    eos = frozenset(tokens_of("eos", eos))
    with Decoding(model, cache, prompts, chunk=chunk, observe=observe) as decoding:
        first = decoding.run().unsqueeze(1) if decoding.live else ()
        sequences = [
            _Sequence(branch.prompt, branch.number, prompt, [accept(Draft(), logits).token])
            for branch, prompt, logits in zip(decoding.live, decoding.prompts, first, strict=True)
        ]
        going = _going_on(cache, sequences, eos, max_tokens)
        while going:
            drafts = [_draft(drafter, sequence) for sequence in going]
            _verify(model, cache, going, drafts, accept, observe)
            for sequence in going:
                _cut(sequence, eos, max_tokens)
            going = _going_on(cache, going, eos, max_tokens)
        return [sequence.result() for sequence in sequences]


def _going_on(
    cache: PagedKVCache, sequences: list[_Sequence], eos: Collection[int], max_tokens: int
) -> list[_Sequence]:
    """Those that have not ended; of the others nothing stays cached."""
    ended = {s.branch for s in sequences if s.has_ended(eos, max_tokens)}
    cache.pool.prune(*ended)
    return [s for s in sequences if s.branch not in ended]


def _draft(drafter: Drafter, sequence: _Sequence) -> Draft:
    draft = drafter((*sequence.prompt, *sequence.tokens))
    if not isinstance(draft, Draft):
        raise InputError(f"drafter returned {type(draft).__name__}; expected a Draft")
    return draft


@torch.no_grad()
def _verify(
    model: Model,
    cache: PagedKVCache,
    sequences: list[_Sequence],
    drafts: list[Draft],
    accept: Accept,
    observe: Observe | None,
) -> None:
    """One pass of the model over all drafts, and what it adds to the sequences."""
    parents = [[ROOT, *(parent + 1 for parent in draft.parents)] for draft in drafts]
    step = cache.step({}, {s.branch: tree for s, tree in zip(sequences, parents, strict=True)})
    pairs = list(zip(sequences, drafts, strict=True))
    rows = torch.tensor(
        [token for s, draft in pairs for token in (s.tokens[-1], *draft.tokens)],
        device=cache.device,
    )
    logits = logits_of(model, rows, step, torch.arange(len(rows), device=cache.device))
    if observe is not None:
        observe(step, [Branch(s.number, tuple(s.tokens), number=s.branch) for s in sequences])
    for (sequence, draft), part in zip(pairs, logits.split(list(map(len, parents))), strict=True):
        path, token = accept(draft, part)
        cache.pool.accept(sequence.branch, [0, *(number + 1 for number in path)])
        sequence.tokens += [*(draft.tokens[number] for number in path), token]
        sequence.passes += 1
        sequence.drafted += len(draft.tokens)
        sequence.accepted += len(path)


def _cut(sequence: _Sequence, eos: Collection[int], max_tokens: int) -> None:
    """Nothing follows the first token that ends a sequence."""
    ends = (place + 1 for place, token in enumerate(sequence.tokens) if token in eos)
    length = min(next(ends, max_tokens), max_tokens)
    # The last token of a pass is the model's own, those before it are of the draft.
    sequence.accepted -= max(0, len(sequence.tokens) - length - 1)
    del sequence.tokens[length:]

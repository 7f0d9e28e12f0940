"""The loop: a control says which branches go on, split or end, the pool and the model follow.

The paper's branch controller (DeFT, ICLR 2025) decides after each step what becomes of the tree;
here it is any callable, and never touches KV. A split copies nothing, a pruned branch gives its
pages back, and only rows of new tokens run through the model.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from types import TracebackType

import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.decoding.branch import Branch, Control, Next
from deft_tvm.decoding.given import tokens_of
from deft_tvm.decoding.model import Model
from deft_tvm.errors import InputError
from deft_tvm.pytorch import PagedKVCache, Step

Observe = Callable[[Step, Sequence[Branch]], None]
"""Is shown each step after the model ran, and the branches that were live in it."""


class Decoding:
    """Branches below prompts, as far as they have come; `decode` does all of this by itself.

    Use it as a context: on exit, by an exception too, the branches that it made are pruned. Others
    in the same cache stay as they are. ::

        with Decoding(model, cache, prompts) as decoding:
            while decoding.live:
                decoding.choose(control(decoding.live, decoding.run()))

    Attributes:
        cache: where KV lies.
        prompts: tokens of each.
        live: in the order in which the control named them; at first one for each prompt.
        finished: results, in the order in which they ended.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        prompts: Sequence[Sequence[int]],
        *,
        chunk: int = 1024,
        observe: Observe | None = None,
    ) -> None:
        """A new tree for each prompt, with nothing cached yet.

        Args:
            model: see `Model`.
            cache: of the model's layers.
            prompts: tokens of each, at least one.
            chunk: at most so many rows run through the model at once.
            observe: see `Observe`; by default nobody looks.

        Raises:
            InputError: a prompt is empty or not of integers, or `chunk` is less than 1.
        """
        if whole("chunk", chunk, InputError) < 1:
            raise InputError(f"chunk is {chunk}; expected 1 or more rows")
        self.prompts = [tokens_of(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
        for place, prompt in enumerate(self.prompts):
            if not prompt:
                raise InputError(f"prompts[{place}] is empty; expected one token or more")
        self.cache = cache
        self._model, self._chunk, self._observe = model, chunk, observe
        self._logits: dict[int, Tensor] = {}
        self.finished: list[Branch] = []
        self.live = [Branch(place, number=cache.pool.root()) for place in range(len(self.prompts))]

    def run(self) -> Tensor:
        """Cache all tokens of live branches that are not cached yet, prompts as well.

        Returns:
            ``[live, vocabulary]``, logits of what follows each live branch.

        Raises:
            OutOfPages: the tree is as before the pass that had no room. After `cache.resize`, or
                when others gave pages back, `run` goes on where it was.
            InputError: nothing is live, or the model returned something else than logits of the
                rows to keep.
        """
        if not self.live:
            raise InputError("live is empty; expected a branch or more to run")
        for part in self._parts():
            self._pass(part)
        return torch.stack([self._logits[branch.number] for branch in self.live])

    def choose(self, nexts: Iterable[Next]) -> None:
        """Split, go on with and prune the live branches; `run` caches their new tokens.

        Nothing is copied for a branch that forks. Where one is left alone after another was
        pruned, at most the half-full page that they shared is.

        Raises:
            InputError: a parent is no place among the live branches, tokens are no integers, or a
                score is no number; nothing was changed.
        """
        nexts = _checked(nexts, len(self.live))
        heirs = Counter(following.parent for following in nexts if not following.done)
        pool, parents = self.cache.pool, self.live
        # First what goes: a branch that is left alone takes the pages of both before it forks.
        pool.prune(*(b.number for place, b in enumerate(parents) if not heirs[place]))
        numbers = {
            place: iter(
                [parents[place].number, *pool.fork(parents[place].number, heirs[place] - 1)]
            )
            for place in heirs
        }
        logits, self._logits, self.live = self._logits, {}, []
        for following in nexts:
            parent = parents[following.parent]
            number = -1 if following.done else next(numbers[following.parent])
            branch = Branch(
                parent.prompt,
                parent.tokens + tuple(following.tokens),
                following.score,
                following.state,
                following.done,
                number,
            )
            (self.finished if following.done else self.live).append(branch)
            if not following.done and parent.number in logits:
                self._logits[number] = logits[parent.number]

    def close(self) -> None:
        """Prune the live branches; `live` keeps what they were."""
        pool = self.cache.pool
        there = set(pool.branches)
        pool.prune(*(branch.number for branch in self.live if branch.number in there))

    def __enter__(self) -> Decoding:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _parts(self) -> Iterator[dict[int, Sequence[int]]]:
        """Tokens to cache, by the pool's numbers of their branches, so many rows at a time."""
        part: dict[int, Sequence[int]] = {}
        room = self._chunk
        for branch in self.live:
            missing = self._missing(branch)
            while missing:
                part[branch.number] = missing[:room]
                missing, room = missing[room:], room - len(part[branch.number])
                if not room:
                    yield part
                    part, room = {}, self._chunk
        if part:
            yield part

    def _missing(self, branch: Branch) -> Sequence[int]:
        """Tokens of a branch that are not cached."""
        prompt, cached = self.prompts[branch.prompt], self.cache.pool.length(branch.number)
        if cached >= len(prompt):
            return branch.tokens[cached - len(prompt) :]
        return prompt[cached:] + branch.tokens

    @torch.no_grad()
    def _pass(self, part: Mapping[int, Sequence[int]]) -> None:
        """Run some rows, and remember the logits of branches that are then cached whole."""
        device, pool = self.cache.device, self.cache.pool
        sizes = {number: len(tokens) for number, tokens in part.items()}
        before = {number: pool.length(number) for number in part}
        rows = torch.tensor([token for tokens in part.values() for token in tokens])
        last = dict(zip(part, accumulate(sizes.values()), strict=True))
        try:
            step = self.cache.step(sizes)
            whole = [b.number for b in self.live if b.number in part and not self._missing(b)]
            keep = torch.tensor([last[number] - 1 for number in whole], dtype=torch.int64)
            logits = logits_of(self._model, rows.to(device), step, keep.to(device))
        except BaseException:
            for number, length in before.items():
                pool.rewind(number, length)
            raise
        self._logits.update(zip(whole, logits.unbind(), strict=True))
        if self._observe is not None:
            self._observe(step, tuple(self.live))


def _checked(nexts: Iterable[Next], live: int) -> list[Next]:
    """What becomes of so many branches, with Python's own numbers; see `Decoding.choose`."""
    if not isinstance(nexts, Iterable):
        raise InputError(f"nexts is {nexts!r}; expected a Next for each branch that goes on")
    checked = []
    for place, following in enumerate(nexts):
        if not isinstance(following, Next):
            raise InputError(f"nexts[{place}] is {following!r}; expected a Next")
        parent = whole(f"nexts[{place}].parent", following.parent, InputError)
        if not 0 <= parent < live:
            raise InputError(
                f"nexts[{place}].parent is {parent}; expected the place of one of {live} live "
                "branches"
            )
        try:
            tokens, score = tuple(map(operator.index, following.tokens)), float(following.score)
        except (TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise InputError(
                f"nexts[{place}] has tokens {following.tokens!r} and score {following.score!r}; "
                "expected integers and a number"
            )
        checked.append(following._replace(parent=parent, tokens=tokens, score=score))
    return checked


def logits_of(model: Model, tokens: Tensor, step: Step, keep: Tensor) -> Tensor:
    """What `Model` returns.

    Raises:
        InputError: it is something else.
    """
    logits = model(tokens, step, keep)
    if not isinstance(logits, Tensor):
        raise InputError(f"model returned {type(logits).__name__}; expected a torch.Tensor")
    if logits.dim() != 2 or len(logits) != len(keep):
        raise InputError(
            f"model returned logits of shape {tuple(logits.shape)}; expected "
            f"({len(keep)}, vocabulary), a row for each of keep"
        )
    if logits.numel() and not logits.max() < torch.inf:
        raise InputError("model returned logits that are NaN or infinite; expected numbers")
    return logits


def decode(
    model: Model,
    cache: PagedKVCache,
    prompts: Sequence[Sequence[int]],
    control: Control,
    max_steps: int | None = None,
    *,
    chunk: int = 1024,
    observe: Observe | None = None,
) -> list[Branch]:
    """Decode trees below prompts until no branch is live.

    The cache is left as it was: all branches that this made are pruned, also where it ends by an
    exception.

    Args:
        model: see `Model`.
        cache: of the model's layers; it may hold other branches.
        prompts: tokens of each, at least one; each is the root of a tree of its own.
        control: says after each step what becomes of the live branches, see `Control`.
        max_steps: the control is asked so often at most; by default until nothing is live, which
            only the control can bring about.
        chunk: at most so many rows run through the model at once.
        observe: is shown each step after the model ran, those of the prompts too, and the live
            branches in it.

    Returns:
        What is done, in the order in which it ended, then what is still live, in its order. Of the
        live ones the tokens that came last are not cached.

    Raises:
        InputError: a prompt is empty, `chunk` or `max_steps` is out of range, or the control or the
            model returned something that does not fit.
        OutOfPages: the cache has too few pages for the tree; `Decoding` can go on from there.

    >>> decode(model, cache, [prompt], greedy(eos=[2], max_tokens=64))  # doctest: +SKIP
    [Branch(prompt=0, tokens=(464, 2068, 2), score=-1.25, ...)]
    """
    if max_steps is not None and whole("max_steps", max_steps, InputError) < 0:
        raise InputError(f"max_steps is {max_steps}; expected 0 or more, or None")
    with Decoding(model, cache, prompts, chunk=chunk, observe=observe) as decoding:
        for _ in count() if max_steps is None else range(max_steps):
            if not decoding.live:
                break
            logits = decoding.run()
            decoding.choose(control(tuple(decoding.live), logits))
        return [*decoding.finished, *decoding.live]

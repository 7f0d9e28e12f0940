"""A transformers cache whose rows are branches of trees: what they share is there once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.errors import InputError, OutOfPages
from deft_tvm.integrations.huggingface.attention import register
from deft_tvm.integrations.huggingface.handover import HandoverCache, config_of
from deft_tvm.integrations.huggingface.model import run_step, specs_of
from deft_tvm.integrations.huggingface.prompts import read_prompts
from deft_tvm.integrations.huggingface.rows import (
    Rows,
    check_cached,
    check_consecutive,
    kept_columns,
)
from deft_tvm.pytorch import PagedKVCache, Step, TreeAttention


class _Pass(NamedTuple):
    """A forward pass that has begun.

    Attributes:
        step: what its attention runs on.
        rows: of its batch.
        lengths: tokens of each branch before it.
        selection: which of its rows were there before it.
    """

    step: Step
    rows: Rows
    lengths: dict[int, int]
    selection: list[int]


class TreeCache(HandoverCache):
    """A cache for ``generate()``, or any loop that hands ``past_key_values`` on.

    Each row of the batch is a branch. Reordering, repeating and selecting rows forks and prunes
    branches, and no keys or values are moved. A batch of k times as many rows as there are
    branches continues each branch k times, as ``num_beams`` and ``num_return_sequences`` want it.
    Rows of an empty cache are read each for itself; `prefill` reads what they share once.

    A pass that fails before its last layer has attended leaves the cache as it was before it.

    Attributes:
        paged: pages and branches.
        max_pages: to how many pages it may grow; None: to any number.
    """

    def __init__(
        self,
        model: Any,
        *,
        page_size: int = 16,
        num_pages: int = 64,
        max_pages: int | None = None,
        attention: Iterable[TreeAttention] = (),
    ) -> None:
        """
        Args:
            model: whose cache it is; it is not kept, nor its attention changed:
                ``model.set_attn_implementation("deft_tvm")``.
            page_size: tokens a page.
            num_pages: pages of each layer at first; they double when they run out.
            max_pages: see the attributes.
            attention: what runs specs of the layers, instead of the best module for each.

        Raises:
            SpecError: its config is none that `deft_tvm.models` knows.
            InputError: it has another dtype or several devices, or there are more pages than
                there may be.
            DeftError: this is no platform that is supported.
        """
        register()
        if max_pages is not None and num_pages > max_pages:
            raise InputError(f"num_pages is {num_pages}; expected at most max_pages={max_pages}")
        specs = specs_of(model, page_size)
        super().__init__(config_of(model), specs)
        self.paged = PagedKVCache(specs, num_pages, model.device, attention=attention)
        self.max_pages = max_pages
        self._branches: list[int] = []
        self._columns = 0
        self._pass: _Pass | None = None

    def __repr__(self) -> str:
        return f"TreeCache(rows={len(self._branches)}, columns={self._columns}, {self.paged})"

    @property
    def branches(self) -> list[int]:
        """The branch of each row of the batch, in ``paged.pool``."""
        self._recover()
        return list(self._branches)

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first."""
        return len(self.branches)

    def prefill(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Read each prompt once, all but its last token, of which ``generate()`` makes logits.

        Beginnings that several prompts share are read once, and prompts are not padded. Then
        ``generate(input_ids, past_key_values=cache, ...)`` goes on.

        Args:
            model: the cache's; its attention is ``deft_tvm`` while it reads.
            input_ids: int64[B, L].
            attention_mask: ``[B, L]``, false for padding on the left; None: there is none.

        Raises:
            InputError: there are rows already, no prompts or no tokens of them, or padding
                elsewhere.
            OutOfPages: the cache may not grow so far; it is empty then.
        """
        if self.batch_size:
            raise InputError(f"the cache has {self.batch_size} rows; expected none: reset()")
        if input_ids.dim() != 2 or not input_ids.numel():
            raise InputError(
                f"input_ids has shape {list(input_ids.shape)}; expected [prompts, tokens], one or "
                "more of both"
            )
        batch, length = input_ids.shape
        kept = kept_columns(attention_mask, (batch, length), 0)
        texts = [ids if kept is None else ids[kept[i]] for i, ids in enumerate(input_ids)]
        nothing = torch.empty(0, dtype=torch.int64, device=input_ids.device)

        def read(counts: Mapping[int, int], tokens: Tensor) -> None:
            run_step(model, tokens, self._room(counts), nothing)

        try:
            branches = read_prompts(self.paged.pool, [text[:-1] for text in texts], read)
        except BaseException:
            self.reset()
            raise
        self._branches, self._columns = branches, length - 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far, those of padding counted as well."""
        return self._columns

    def begin(
        self, layer: int, query: Tensor, mask: Any, positions: Tensor | None
    ) -> tuple[Step, Rows]:
        shape = (query.shape[0], query.shape[2])
        if layer == 0:
            self._recover()
            self._pass = self._begin(shape, mask, positions)
        if self._pass is None or self._pass.rows.shape != shape:
            raise InputError(
                f"layer {layer} has a batch of {list(shape)}; expected layer 0 before it, with the "
                f"same batch"
            )
        return self._pass.step, self._pass.rows

    def end(self, layer: int) -> None:
        if self._pass is not None and layer == len(self.specs) - 1:
            self._columns += self._pass.rows.shape[1]
            self._pass = None

    def _begin(self, shape: tuple[int, int], mask: Any, positions: Tensor | None) -> _Pass:
        """Room for a batch, and a plan."""
        batch, length = shape
        copies = self._copies(batch)
        pool = self.paged.pool
        kept = kept_columns(mask, shape, self._columns)
        lengths = [pool.length(b) for b in self._branches for _ in range(copies)] or [0] * batch
        check_cached(kept, self._columns, lengths)
        new = None if kept is None else kept[:, self._columns :]
        check_consecutive(positions, new)
        rows = Rows(batch, length, None if new is None or bool(new.all()) else new)
        selection = list(range(0, batch, copies)) if self._branches else []
        if not self._branches:
            self._branches = [pool.root() for _ in range(batch)]
        elif copies > 1:
            self.batch_repeat_interleave(copies)
        counts = {b: n for b, n in zip(self._branches, rows.counts, strict=True) if n}
        try:
            step = self._room(counts)
        except BaseException:
            self._select(selection)
            raise
        before = dict(zip(self._branches, lengths, strict=True))
        return _Pass(step, rows, before, selection)

    def _copies(self, batch: int) -> int:
        """By how many rows of a batch each row so far is continued."""
        rows = len(self._branches)
        if batch % (rows or 1):
            raise InputError(
                f"input_ids has {batch} rows, and the cache {rows}; expected as many or a multiple"
            )
        return batch // rows if rows else 1

    def _room(self, counts: Mapping[int, int]) -> Step:
        """`PagedKVCache.step`, with more pages where they run out."""
        while True:
            try:
                return self.paged.step(counts)
            except OutOfPages:
                needed = sum(self.paged.pages_for(count) for count in counts.values())
                if not self._grow(needed - self.paged.pool.num_free):
                    raise

    def _grow(self, more: int) -> bool:
        """Double the pages, until there are so many more, or as many as may be."""
        pages = self.paged.pool.num_pages
        wanted = max(2 * pages, 1)
        while wanted - pages < more:
            wanted *= 2
        if self.max_pages is not None:
            wanted = min(wanted, self.max_pages)
        if wanted > pages:
            self.paged.resize(wanted)
        return wanted > pages

    def _recover(self) -> None:
        """Forget what a pass that was not ended has begun."""
        begun, self._pass = self._pass, None
        if begun is not None:
            for branch, length in begun.lengths.items():
                self.paged.pool.rewind(branch, length)
            self._select(begun.selection)

    def _select(self, rows: Sequence[int]) -> None:
        """Let the batch be these of its rows, some of them several times."""
        self._recover()
        pool = self.paged.pool
        rest = {row: pool.fork(self._branches[row], rows.count(row) - 1) for row in set(rows)}
        gone = [branch for row, branch in enumerate(self._branches) if row not in rest]
        for row, copies in rest.items():
            copies.append(self._branches[row])
        self._branches = [rest[row].pop() for row in rows]
        pool.prune(*gone)
        if not self._branches:
            self._columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on after what row ``beam_idx[i]`` has been, as beams do.

        Raises:
            InputError: there is no such row.
        """
        self._select(self._numbers("beam_idx", beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: int64[rows], or bool for each.

        Raises:
            InputError: there is no such row, or not a bool for each.
        """
        if indices.dtype is torch.bool:
            if indices.shape != (self.batch_size,):
                raise InputError(
                    f"indices is bool of shape {list(indices.shape)}; expected "
                    f"[{self.batch_size}], one for each row"
                )
            indices = indices.nonzero()[:, 0]
        self._select(self._numbers("indices", indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be so many.

        Raises:
            InputError: `repeats` is less than 1.
        """
        if whole("repeats", repeats, InputError) < 1:
            raise InputError(f"repeats is {repeats}; expected 1 or more")
        self._select([row for row in range(self.batch_size) for _ in range(repeats)])

    def _numbers(self, name: str, rows: Tensor) -> list[int]:
        if rows.dim() != 1 or rows.is_floating_point():
            raise InputError(
                f"{name} is {rows.dtype} of shape {list(rows.shape)}; expected numbers of rows"
            )
        numbers: list[int] = rows.tolist()
        there = self.batch_size
        for place, row in enumerate(numbers):
            if not 0 <= row < there:
                raise InputError(f"{name}[{place}] is {row}; expected one of {there} rows")
        return numbers

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns of all rows.

        Args:
            tokens_to_remove: how many, as a number below zero.

        Raises:
            InputError: it is above zero, or there are not so many.
        """
        if not -self._columns <= whole("tokens_to_remove", tokens_to_remove, InputError) <= 0:
            raise InputError(
                f"tokens_to_remove is {tokens_to_remove}; expected {-self._columns} to 0"
            )
        self._recover()
        for branch in self._branches:
            length = self.paged.pool.length(branch) + tokens_to_remove
            self.paged.pool.rewind(branch, max(0, length))
        self._columns += tokens_to_remove

    def reset(self) -> None:
        """Forget all rows; pages stay."""
        self._pass = None
        self._branches, self._columns = [], 0
        self.paged.pool.prune(*self.paged.pool.branches)

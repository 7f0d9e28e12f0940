"""A forest as kernels over pages take it: requests of neighbouring rows, and the pages they read.

A request's pages are full but for the last, while a path may end one node in the middle of a page
and begin the next in another. So tokens are packed anew: every page holds what 16 tokens in a row
of some request hold, and requests that begin alike have those pages in common, as where a server
caches prefixes. Rows are numbered in depth-first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.pieces import tree_rows

PAGE = 16
NO_TOKEN = -1


@dataclass(frozen=True)
class Level:
    """What one call reads: every row belongs to one request, every request has tokens.

    Attributes:
        begins: requests + 1 integers, the first row of each request, and their number.
        tokens: int64[n] of each request, numbers of the tokens that its rows read together.
        reads: bool[rows], or None where all do: the others read a token for nothing, as there is
            none for them on this level and no request may be empty.
    """

    begins: list[int]
    tokens: list[Tensor]
    reads: Tensor | None = None


Cut = Callable[[Gathered], list[Level]]


def by_sequence(gathered: Gathered) -> list[Level]:
    """Each row reads its own path, in a request of its own."""
    paths = [seen.nonzero().squeeze(1) for seen in gathered.seen]
    return [Level(list(range(len(paths) + 1)), paths)]


def by_prefix(gathered: Gathered) -> list[Level]:
    """All rows of a tree read together what all of them see, then each the rest of its path."""
    paths: list[list[Tensor]] = []
    for begin, end in tree_rows(gathered.case.forest):
        shared = gathered.seen[begin:end].all(0)
        prefix = shared.nonzero().squeeze(1)
        paths += ([prefix, (seen & ~shared).nonzero()[:, 0]] for seen in gathered.seen[begin:end])
    return levels(paths)


def by_node(gathered: Gathered) -> list[Level]:
    """A level for each depth of the forest; nodes with the same rows below count as one."""
    forest = gathered.case.forest
    first = np.cumsum(forest.lengths) - forest.lengths
    runs: dict[int, list[Tensor]] = {}
    paths: list[list[Tensor]] = []
    for node in forest.preorder.tolist():
        parent = int(forest.parents[node])
        above = runs[parent] if parent >= 0 else []
        own = torch.arange(first[node], first[node] + forest.lengths[node])
        if above and _rows(gathered, node) == _rows(gathered, parent):
            runs[node] = [*above[:-1], torch.cat([above[-1], own])]
        else:
            runs[node] = [*above, own]
        begin = int(forest.row_begin[node])
        for seen in gathered.seen[begin : begin + int(forest.rows[node])]:
            paths.append([run if seen[run].all() else run[seen[run]] for run in runs[node]])
    return levels(paths)


def by_tree(gathered: Gathered) -> tuple[Level, Tensor]:
    """All rows of a tree read all its tokens; and bool[Σ rows · tokens], which row sees which."""
    begins, tokens, masks = [0], [], []
    for begin, end in tree_rows(gathered.case.forest):
        seen = gathered.seen[begin:end]
        tokens.append(seen.any(0).nonzero().squeeze(1))
        masks.append(seen[:, tokens[-1]].flatten())
        begins.append(end)
    return Level(begins, tokens), torch.cat(masks)


def levels(paths: Sequence[Sequence[Tensor]]) -> list[Level]:
    """Each row's runs of tokens, those without any left out, one level after another.

    On a level neighbouring rows with the same tokens are a request. Every row must see a token.
    """
    full = [[run for run in path if len(run)] for path in paths]
    depth = max(len(path) for path in full)
    return [
        _level([path[i] if i < len(path) else None for path in full], full) for i in range(depth)
    ]


def _level(runs: list[Tensor | None], paths: list[list[Tensor]]) -> Level:
    begins, tokens = [], []
    for row, run in enumerate(runs):
        if row == 0 or not _same(runs[row - 1], run):
            begins.append(row)
            tokens.append(paths[row][0][:1] if run is None else run)
    reads = torch.tensor([run is not None for run in runs])
    return Level([*begins, len(runs)], tokens, None if reads.all() else reads)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _rows(gathered: Gathered, node: int) -> tuple[int, int]:
    forest = gathered.case.forest
    return int(forest.row_begin[node]), int(forest.row_end[node])


@dataclass(frozen=True)
class Table:
    """A level in the arrays that kernels take, all int32; pages are those of `paged`.

    Attributes:
        row_indptr: [requests + 1], first row of each request.
        page_indptr: [requests + 1], where in `page_indices` its pages begin.
        page_indices: the pages of all requests, end to end.
        last_page_len: [requests], tokens in a request's last page, 1 to `PAGE`.
        lengths: [requests], tokens.
        reads: as in `Level`.
    """

    row_indptr: Tensor
    page_indptr: Tensor
    page_indices: Tensor
    last_page_len: Tensor
    lengths: Tensor
    reads: Tensor | None

    @property
    def requests(self) -> int:
        return len(self.lengths)

    def for_heads(self, heads: int, pages: int) -> Table:
        """Each head's rows as rows of their own, head after head, over pages of their own."""
        if heads == 1:
            return self
        device = self.page_indices.device
        each = torch.arange(heads, dtype=torch.int32, device=device).unsqueeze(1)
        return Table(
            row_indptr=_repeated(self.row_indptr, each),
            page_indptr=_repeated(self.page_indptr, each),
            page_indices=(self.page_indices + each * pages).flatten(),
            last_page_len=self.last_page_len.repeat(heads),
            lengths=self.lengths.repeat(heads),
            reads=None if self.reads is None else self.reads.repeat(heads),
        )

    def to(self, device: torch.device) -> Table:
        """The same arrays on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return replace(self, **moved)


def paged(made: Sequence[Level]) -> tuple[Tensor, list[Table]]:
    """int64[pages, PAGE], the token in each slot or `NO_TOKEN`; and each level's table."""
    filled = [[_in_pages(tokens) for tokens in level.tokens] for level in made]
    rows = torch.cat([request for level in filled for request in level])
    pages, number = torch.unique(rows, dim=0, return_inverse=True)
    counts = [sum(len(request) for request in level) for level in filled]
    tables = [
        _table(level, [len(request) for request in requests], indices)
        for level, requests, indices in zip(made, filled, number.int().split(counts), strict=True)
    ]
    return pages, tables


def cache(pages: Tensor, x: Tensor) -> Tensor:
    """[pages, PAGE, heads, width] of x, [heads, tokens, width]; zeros where there is no token."""
    pages = pages.to(x.device)
    found = x.transpose(0, 1)[pages.clamp(min=0)].contiguous()
    return found.masked_fill_((pages == NO_TOKEN)[..., None, None], 0)


def _in_pages(tokens: Tensor) -> Tensor:
    count = -(-len(tokens) // PAGE)
    padded = tokens.new_full((count * PAGE,), NO_TOKEN)
    padded[: len(tokens)] = tokens
    return padded.view(count, PAGE)


def _table(level: Level, counts: list[int], indices: Tensor) -> Table:
    lengths = torch.tensor([len(tokens) for tokens in level.tokens], dtype=torch.int32)
    return Table(
        row_indptr=torch.tensor(level.begins, dtype=torch.int32),
        page_indptr=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        page_indices=indices.contiguous(),
        last_page_len=(lengths - 1) % PAGE + 1,
        lengths=lengths,
        reads=level.reads,
    )


def _repeated(indptr: Tensor, each: Tensor) -> Tensor:
    """[heads · n + 1] of [n + 1], every repetition beginning where the last one ended."""
    begins = (indptr[:-1] + each * indptr[-1]).flatten()
    return torch.cat([begins, (indptr[-1:] * len(each))])

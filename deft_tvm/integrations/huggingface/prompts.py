"""Prompts read before anything is generated, each prefix that several share once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deft_tvm.pool import PagePool
from deft_tvm.prefixes import padded, shared_prefixes

Read = Callable[[Mapping[int, int], Tensor], None]
"""Runs the model over new tokens of branches: how many each gets, and int64[tokens] of all."""


def read_prompts(pool: PagePool, texts: Sequence[Tensor], read: Read) -> list[int]:
    """Read texts as a tree, from the top, all nodes of one depth in one pass.

    Args:
        pool: in which branches are made.
        texts: int64[tokens] each, none or more.
        read: called for each depth.

    Returns:
        The branch of each text.
    """
    table, counts = padded("input_ids", [text.tolist() for text in texts])
    found = shared_prefixes("input_ids", table, counts, 1)
    parents, lengths, _, through = (array.tolist() for array in found)
    first = len(parents) - len(texts)  # before it are nodes that end no text
    waiting = [(node, pool.root(), 0) for node, parent in enumerate(parents) if parent < 0]
    branches = {}
    while waiting:
        grown = {branch: lengths[node] for node, branch, _ in waiting if lengths[node]}
        if grown:
            parts = [texts[through[n]][start : start + lengths[n]] for n, _, start in waiting]
            read(grown, torch.cat(parts))
        below = []
        for node, branch, start in waiting:
            branches[node] = branch
            children = [child for child, parent in enumerate(parents) if parent == node]
            goes_on = [branch] if node < first else []
            split = goes_on + pool.fork(branch, len(children) - len(goes_on))
            end = start + lengths[node]
            below += [(child, own, end) for child, own in zip(children, split, strict=True)]
        waiting = below
    return [branches[first + number] for number in range(len(texts))]

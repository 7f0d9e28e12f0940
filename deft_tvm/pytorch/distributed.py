"""Several processes with a part of the attention each: what makes one answer of theirs.

Two ways to divide it, each with one function here:

*Tensor parallel*: a rank has query heads of its own and the KV heads that they read
(`AttentionSpec.shard`), and `gather_heads` puts heads side by side. A model needs that only where
it wants whole rows: usually each rank multiplies its heads with its part of the output projection,
and ``torch.distributed.all_reduce`` sums.

*Context parallel*: a rank has a part of the forest's KV (`deft_tvm.context`) and answers for all
rows and heads, and `merge_ranks` merges by log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from deft_tvm.pytorch.merge import merge_states
from deft_tvm.pytorch.sinks import apply_sinks


def gather_heads(
    out: Tensor, lse: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """All heads, from a module of ``spec.shard(rank, world)`` on each rank.

    Args:
        out: [R, query heads of the rank, v_width], of any type; shape and type are the same on
            every rank.
        lse: [R, query heads of the rank], float32.
        group: the ranks, in the order of their shards; by default all.

    Returns:
        out ``[R, query heads, v_width]`` and lse ``[R, query heads]``, on every rank.
    """
    gathered = _all(out, group), _all(lse, group)
    return gathered[0].movedim(0, 1).flatten(1, 2), gathered[1].movedim(0, 1).flatten(1, 2)


def merge_ranks(
    out: Tensor,
    lse: Tensor,
    group: dist.ProcessGroup | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the KV of all ranks, from attention over that of each.

    All ranks merge in the same order and so get the same bits. A narrow `out` is rounded once more
    than in a single process: run in float32 where that matters.

    Args:
        out: [R, query heads, v_width], the same rows on every rank.
        lse: [R, query heads], natural logarithm; -inf where the rank has nothing that a row sees.
        group: the ranks; by default all.
        sinks: [query heads], where the attention has them: they belong to rows and not to ranks,
            so the ranks' own spec is without.

    Returns:
        As `TreeAttention.run`; zeros and -inf, or the sinks, for a row that sees nothing anywhere.
    """
    merged = merge_states(_all(out, group), _all(lse, group))
    return merged if sinks is None else apply_sinks(*merged, sinks)


def _all(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ...]."""
    ranks = dist.get_world_size(group)
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(found, tensor.contiguous(), group=group)
    return torch.stack(found)

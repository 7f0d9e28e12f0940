"""One of several processes.

Its part of the attention runs by modules in `folder`, and rank 0 leaves what came out there.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from deft_tvm.context import context_part, divide_context
from deft_tvm.pages import PageTable
from deft_tvm.pytorch import (
    TreeAttention,
    apply_sinks,
    gather_heads,
    merge_ranks,
    merge_states,
)
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, tensors

# Rows at inner nodes and leaves, a node with more rows than one, one that no rank has tokens for,
# and a row that sees nothing.
FOREST = Forest.from_parents(
    [-1, 0, 0, 1, 1, -1, 2], [70, 13, 5, 9, 3, 0, 0], [0, 3, 1, 2, 1, 1, 2]
)


def whole(spec: AttentionSpec) -> Case:
    """The same numbers in every process."""
    return tensors(FOREST, spec)


def shard_of(spec: AttentionSpec, case: Case, rank: int, world: int) -> tuple[torch.Tensor, ...]:
    """q and the caches of a rank."""
    heads = spec.num_q_heads // world
    begin, end = spec.heads_of_shard(rank, world)
    caches = [
        cache[:, :, begin:end] if buffer.heads == spec.num_kv_heads else cache
        for cache, buffer in zip(case.buffers, spec.buffers, strict=True)
    ]
    return case.q[:, rank * heads : (rank + 1) * heads], *caches


def tensor_parallel(
    spec: AttentionSpec, folder: Path, rank: int, world: int
) -> tuple[torch.Tensor, torch.Tensor]:
    case = whole(spec)
    attention = TreeAttention(spec.shard(rank, world), folder / f"shard{world}")
    attention.plan(case.forest, case.pages)
    q, *caches = shard_of(spec, case, rank, world)
    return gather_heads(*attention.run(q, caches))


def context_parallel(
    spec: AttentionSpec, folder: Path, rank: int, world: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rank with the pages of its part alone, in an order of its own."""
    case = whole(spec)
    begin, end = divide_context(case.forest, rank, world, spec.page_size)
    own, caches = pages_of(case, begin.tolist(), end.tolist())
    part, table = context_part(case.forest, begin, end, own)
    attention = TreeAttention(spec, folder / "whole")
    attention.plan(part, table)
    return merge_ranks(*attention.run(case.q, caches))


def pages_of(
    case: Case, begin: list[int], end: list[int]
) -> tuple[PageTable, tuple[torch.Tensor, ...]]:
    """The rank's own cache: only the pages that hold its tokens, last first."""
    size, table = case.spec.page_size, case.pages
    taken: list[int] = []
    counts, slots = [0], []
    for node, (first, last) in enumerate(zip(begin, end, strict=True)):
        x = int(table.first_slot[node])
        slots.append((x + first) % size)
        pages = range((x + first) // size, (x + last - 1) // size + 1) if last > first else ()
        taken += [int(table.page_indices[table.page_indptr[node] + page]) for page in pages]
        counts.append(len(taken))
    kept = sorted(set(taken), reverse=True) or [0]
    own = PageTable([kept.index(page) for page in taken], counts, slots, page_size=size)
    return own, tuple(buffer[kept] for buffer in case.buffers)


def take_part(job: str, folder: Path, rank: int, world: int) -> None:
    """What a process does, all of it."""
    torch.set_num_threads(1)
    place = f"file://{folder}/{job}{world}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    spec = AttentionSpec.parse((folder / "spec").read_text())
    jobs = {"tensor": tensor_parallel, "context": context_parallel}
    found = jobs[job](spec, folder, rank, world)
    agreed = [torch.empty_like(found[0]) for _ in range(world)]
    dist.all_gather(agreed, found[0])
    assert all(torch.equal(other, found[0]) for other in agreed), "ranks disagree"
    if rank == 0:
        torch.save(found, folder / f"{job}{world}.pt")
    dist.destroy_process_group()


def take_part_in_a_group(folder: Path, rank: int, world: int) -> None:
    """Every other rank is of one group, each with a state that is a view with gaps."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/groups", rank=rank, world_size=world
    )
    groups = [dist.new_group([*range(first, world, 2)]) for first in range(2)]
    random = torch.Generator().manual_seed(0)
    outs = torch.randn(world, 5, 4, 16, generator=random)[..., ::2]
    lses = torch.randn(world, 5, 8, generator=random)[..., ::2]
    sinks = torch.randn(4, generator=random)
    group, members = groups[rank % 2], [*range(rank % 2, world, 2)]
    merged = merge_states(outs[members], lses[members])
    with_sinks = apply_sinks(*(tensor.clone() for tensor in merged), sinks)
    heads = torch.cat([*outs[members]], dim=1), torch.cat([*lses[members]], dim=1)
    for found, wanted in (
        (merge_ranks(outs[rank], lses[rank], group), merged),
        (merge_ranks(outs[rank], lses[rank], group, sinks), with_sinks),
        (gather_heads(outs[rank], lses[rank], group), heads),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    dist.destroy_process_group()

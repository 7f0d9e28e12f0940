"""Attention divided among processes, for real, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from built import artifact
from cases import TILES, forests, profile
from forked import processes
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import FOREST, take_part, take_part_in_a_group, whole

from deft_tvm.context import context_part, divide_context
from deft_tvm.errors import PageError, PlanError, TreeError
from deft_tvm.pages import PageTable
from deft_tvm.plan import make_plan
from deft_tvm.reference import dense_mask
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest

GLA = AttentionSpec.gla(
    num_q_heads=8, num_latent_heads=2, latent_dim=16, rope_dim=8, nope_dim=8, page_size=4
)
GQA = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=4, head_dim=16, page_size=4)


def start_ranks(target: Callable[..., None], world: int, *arguments: object) -> None:
    """So many processes, which all come to their end."""
    ranks = [
        processes.Process(target=target, args=(*arguments, rank, world)) for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world


def run_ranks(job: str, spec: AttentionSpec, world: int, folder: Path) -> None:
    """The result of all ranks together is that of one process, which the oracle gives."""
    (folder / "spec").write_text(str(spec))
    if job == "tensor":
        # Shards of all ranks are the same spec.
        (folder / f"shard{world}").symlink_to(artifact(spec.shard(0, world)))
        assert all(spec.shard(rank, world) == spec.shard(0, world) for rank in range(world))
    else:
        (folder / "whole").symlink_to(artifact(spec))
    start_ranks(take_part, world, job, folder)
    out, lse = torch.load(folder / f"{job}{world}.pt")
    exact = whole(spec).reference()
    bound = exact.bound()
    dead = exact.lse == -torch.inf
    assert dead.any() and torch.equal(lse == -torch.inf, dead) and not out[dead].any()
    assert (out - exact.out).abs().max() <= bound.out
    assert (lse - exact.lse)[~dead].abs().max() <= bound.lse


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spec", [GQA, GLA], ids=["gqa", "gla"])
def test_tensor_parallel(spec: AttentionSpec, world: int, tmp_path: Path) -> None:
    """GLA's two latents go to two ranks, and to four ranks as two copies each."""
    run_ranks("tensor", spec, world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spec", [GQA, GLA], ids=["gqa", "gla"])
def test_context_parallel(spec: AttentionSpec, world: int, tmp_path: Path) -> None:
    run_ranks("context", spec, world, tmp_path)


def test_a_group_of_ranks_has_its_own_answer(tmp_path: Path) -> None:
    start_ranks(take_part_in_a_group, 4, tmp_path)


@settings(max_examples=200)
@given(forests(), st.integers(1, 5), st.sampled_from((1, 4)))
def test_every_token_is_seen_by_the_same_rows_in_one_part(
    forest: Forest, world: int, unit: int
) -> None:
    wanted = mask_of(forest)
    first = np.cumsum(forest.lengths) - forest.lengths
    seen = torch.zeros_like(wanted)
    covered = np.zeros(forest.num_tokens, int)
    for rank in range(world):
        begin, end = divide_context(forest, rank, world, unit)
        part, _ = context_part(forest, begin, end)
        held = zip(first + begin, first + end, strict=True)
        tokens = [token for node in held for token in range(*node)]
        covered[tokens] += 1
        found = mask_of(part)
        assert found.shape == (forest.num_rows, len(tokens))
        seen[:, tokens] = found
        assert all(begin[n] % unit == 0 or begin[n] == forest.lengths[n] for n in range(len(begin)))
    assert (covered == 1).all() and torch.equal(seen, wanted)


def mask_of(forest: Forest) -> torch.Tensor:
    return dense_mask(
        forest.parents.tolist(),
        forest.lengths.tolist(),
        forest.rows.tolist(),
        forest.bidirectional.astype(bool).tolist(),
    )


def test_parts_are_even() -> None:
    forest = Forest.from_parents([-1, 0], [1000, 3])
    begin, end = zip(*(divide_context(forest, rank, 4, 16) for rank in range(4)), strict=True)
    assert [b[0] for b in begin] == [0, 240, 496, 752] and [e[0] for e in end] == [
        240,
        496,
        752,
        1000,
    ]


def test_parts_of_long_nodes() -> None:
    """Whose tokens, times the ranks, are no number of 32 bits."""
    forest = Forest.from_parents([-1], [2**30])
    begin, end = divide_context(forest, 6, 8)
    assert (begin[0], end[0]) == (6 * 2**27, 7 * 2**27)


def test_a_part_has_no_more_nodes_than_it_needs() -> None:
    """One more only for rows whose tokens are elsewhere, where others of their node are here."""
    forest = Forest.from_parents([-1, 0], [10, 3], [0, 2])
    for begin, end in (([2, 0], [6, 3]), ([0, 1], [10, 1]), ([0, 2], [10, 2])):
        part, _ = context_part(forest, begin, end)
        assert part.parents.tolist() == [-1, 0] and part.rows.tolist() == [0, 2]
        assert part.lengths.tolist() == [end[0] - begin[0], end[1] - begin[1]]
    part, _ = context_part(forest, [0, 0], [10, 1])
    assert part.parents.tolist() == [-1, 0, 1] and part.rows.tolist() == [0, 0, 2]


def test_refusals() -> None:
    for rank in (2, -1):
        with pytest.raises(TreeError, match=f"rank is {rank}; expected one of 0 to 1"):
            divide_context(FOREST, rank, 2)
    for arguments in ((0.5, 2), (0, 2.5), (0, 2, 1.5)):
        with pytest.raises(TreeError, match=r"^(rank|world|unit) is .\.5; expected an integer"):
            divide_context(FOREST, *arguments)
    with pytest.raises(TreeError, match="unit is 0; expected 1 or more tokens"):
        divide_context(FOREST, 0, 2, unit=0)
    held = divide_context(FOREST, 0, 2)
    for pages in (PageTable([0], [0, 1], page_size=4), PageTable.contiguous(FOREST)):
        with pytest.raises(PageError, match=r"pages are PageTable.*; expected those of 7 nodes"):
            context_part(FOREST, *held, pages)
    zeros, lengths = np.zeros(FOREST.num_nodes, np.int32), FOREST.lengths
    with pytest.raises(TreeError, match=r"begin\[0\] is 0 and end\[0\] 71; expected a range"):
        context_part(FOREST, zeros, lengths + 1)
    for begin, end in ((-1, 3), (5, 3)):
        with pytest.raises(TreeError, match=rf"begin\[0\] is {begin} and end\[0\] {end}; expected"):
            context_part(FOREST, [begin, *lengths[1:]], [end, *lengths[1:]])
    divided = lengths.copy()
    divided[1] = 11
    with pytest.raises(TreeError, match=r"end\[1\] is 11; expected 10 or less, or 13: the"):
        context_part(FOREST, zeros, divided)
    with pytest.raises(TreeError, match=r"begin\[1\] is 11; expected 10 or less, or 13: the"):
        context_part(FOREST, divided, lengths)


def test_pages_of_a_part() -> None:
    forest = Forest.from_parents([-1, 0], [10, 3], [2, 1])
    table = PageTable([5, 7, 2], [0, 2, 3], [0, 1], page_size=4)
    part, pages = context_part(forest, [0, 0], [8, 3], table)
    assert part.parents.tolist() == [-1, 0, 0] and part.lengths.tolist() == [8, 0, 3]
    assert part.rows.tolist() == [0, 2, 1]
    assert pages.page_indptr.tolist() == [0, 2, 2, 3] and pages.first_slot.tolist() == [0, 0, 1]
    pages.check(part)


def test_a_part_has_no_window() -> None:
    part, pages = context_part(FOREST, *divide_context(FOREST, 0, 2))
    with pytest.raises(PlanError, match="window is 8; expected None, as positions in a part of a"):
        make_plan(part, pages, replace(GQA, window=8), TILES[0], profile())


def test_a_part_of_pages_that_begin_later_in_their_table() -> None:
    forest = Forest.from_parents([-1, 0, 0], [6, 3, 1])
    pages = PageTable([99, 8, 3, 3, 5, 5], [1, 3, 5, 6], [0, 2, 1], page_size=4)
    part, table = context_part(forest, *divide_context(forest, 0, 1), pages)
    table.check(part)
    assert table.page_indices.tolist() == [8, 3, 3, 5, 5]

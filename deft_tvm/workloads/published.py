"""Trees of other publications: those on which kernels were measured, and a draft.

A tree is a number of nodes and a number of tokens for each level; the nodes of a level are dealt
evenly to those of the level above, and every leaf's newest token has a row.
"""

from __future__ import annotations

from deft_tvm.errors import WorkloadError
from deft_tvm.tree import Forest

Levels = tuple[tuple[int, ...], tuple[int, ...]]

FASTTREE: tuple[Levels, ...] = (
    ((1, 2, 64), (8, 256, 32)),
    ((1, 4, 256), (8, 256, 32)),
    ((1, 4, 8, 256), (8, 256, 256, 32)),
    ((1, 256), (256, 32)),
    ((1, 1024), (2048, 32)),
    ((1, 16, 64), (1024, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
    ((1, 10), (4000, 400)),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16, 16, 16, 16)),
    ((1, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16, 16)),
    ((1, 8, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16, 16)),
    ((1, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16)),
    ((1, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16)),
)
"""FastTree (MLSys 2025), ``kernel_bench/run_benchmark.sh`` of its artifact."""

PAT: tuple[Levels, ...] = (
    ((1, 10), (4096, 416)),
    ((1, 256), (256, 32)),
    ((1, 1024), (2048, 32)),
    ((1, 2, 64), (1024, 256, 256)),
    ((1, 4, 256), (32, 256, 32)),
    ((1, 8, 512), (32, 512, 256)),
    ((1, 8, 512), (32, 2048, 256)),
    ((1, 8, 512), (512, 512, 256)),
    ((1, 4, 8, 256), (32, 256, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 32, 256, 64, 32, 256)),
    ((1, 16, 32, 64, 128, 1024), (256, 128, 64, 32, 32, 32)),
    ((1, 16, 32, 64, 256, 1024), (256, 128, 64, 32, 32, 32)),
    ((1, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 32, 32, 32, 32)),
    ((1, 8, 16, 32, 64, 256, 1024), (256, 128, 64, 32, 32, 32, 32)),
    ((2, 8, 16, 256), (256, 256, 32, 32)),
    ((4, 16, 256, 512), (512, 32, 128, 32)),
    ((8, 16, 32, 256), (512, 512, 256, 32)),
    ((256,), (1024,)),
    ((256,), (4096,)),
)
"""PAT (ASPLOS 2026), ``benchmark/run_kernel_bench.sh`` of its repository."""

EAGLE: tuple[tuple[int, ...], ...] = (
    *((a,) for a in range(4)),
    *((0, a) for a in range(3)),
    *((1, a) for a in range(2)),
    *((2, a) for a in range(2)),
    (3, 0),
    *((0, 0, a) for a in range(3)),
    *((0, 1, a) for a in range(2)),
    *((0, 2, a) for a in range(2)),
    (1, 0, 0),
    *((0, 0, 0, a) for a in range(3)),
    *((0, 0, 0, 0, a) for a in range(2)),
)
"""EAGLE's draft tree (Li et al. 2024, arXiv 2401.15077), as paths of child ranks: 25 tokens, which
with the one that is known are 26 nodes."""


def published(name: str, trees: tuple[Levels, ...], number: int) -> Forest:
    """Tree `number` of a list, counted from 1.

    Raises:
        WorkloadError: the list has no such tree.
    """
    if not 1 <= number <= len(trees):
        raise WorkloadError(f"{name}: tree is {number}; expected 1 to {len(trees)}")
    nodes, tokens = trees[number - 1]
    parents, lengths, above = [-1] * nodes[0], [tokens[0]] * nodes[0], 0
    for upper, count, length in zip(nodes, nodes[1:], tokens[1:], strict=False):
        parents += [above + i * upper // count for i in range(count)]
        lengths += [length] * count
        above += upper
    return Forest.from_parents(parents, lengths)

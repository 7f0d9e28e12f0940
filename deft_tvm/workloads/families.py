"""Families of trees, each a function of a few sizes.

Its name and the names and defaults of its arguments are the spelling that `notation` reads, the
first line of its docstring the description. All are the same on every machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deft_tvm.errors import WorkloadError
from deft_tvm.tree import Forest
from deft_tvm.workloads.published import FASTTREE, PAT, published

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Workload:
    """A forest to run attention on.

    Attributes:
        name: the string that `parse` makes it from, every argument spelled out.
        forest: the trees.
        description: one sentence.
    """

    name: str
    forest: Forest
    description: str

    def __str__(self) -> str:
        return self.name


FAMILIES: dict[str, Callable[..., Forest]] = {}


def _family(function: Callable[..., Forest]) -> Callable[..., Forest]:
    FAMILIES[function.__name__] = function
    return function


@_family
def few_shot(prompt: int = 4000, branches: int = 32, tokens: int = 64, vary: int = 0) -> Forest:
    """One prompt and the answers that are sampled from it at once.

    DeFT, table 4. With `vary` the lengths of answers lie between tokens - vary and
    tokens + vary, in an order that mixes long and short.
    """
    if vary > tokens:
        raise WorkloadError(f"vary is {vary}; expected at most tokens, which is {tokens}")
    mixed = np.arange(1, branches + 1) * GOLDEN_RATIO % 1
    lengths = tokens - vary + (mixed * (2 * vary + 1)).astype(int)
    return Forest.from_parents([-1] + [0] * branches, [prompt, *lengths.tolist()])


@_family
def multi_step(root: int = 1200, levels: int = 3, width: int = 10, tokens: int = 300) -> Forest:
    """Tree of thoughts: a level of thoughts at a time, of which one survives to the next.

    DeFT, table 4. The last level is being written; of those above only the survivor is still
    cached, as pruning frees the rest.
    """
    survivors = list(range(levels - 1))
    parents = [-1, *survivors, *[levels - 1] * width]
    return Forest.from_parents(parents, [root] + [tokens] * (len(parents) - 1))


@_family
def speculative(nodes: int = 64, context: int = 1000, batch: int = 1) -> Forest:
    """Draft trees of speculative decoding, one token a node, each under its own context.

    The last token of the context is the first of the `nodes` rows of a tree; see `draft_choices`.
    """
    return Forest.from_choices(draft_choices(nodes - 1), [context] * batch)


@_family
def beam(prompt: int = 1024, beams: int = 16, tokens: int = 128) -> Forest:
    """Beam search: histories that have forked and died out, so that most of them is shared.

    Each step every beam goes on from one that is picked at random, the better ones more often;
    what is left of the ancestry after `tokens` steps is the tree.
    """
    random = np.random.default_rng(0)
    weights = np.linspace(1.5, 0.5, beams)
    histories = np.arange(beams)[:, None]
    for _ in range(tokens - 1):
        origin = random.choice(beams, beams, p=weights / weights.sum())
        histories = np.column_stack([histories[origin], np.arange(beams)])
    prompts = np.zeros((beams, prompt), dtype=int)
    return Forest.from_branches(np.column_stack([prompts, histories]).tolist())[0]


@_family
def sequences(count: int = 16, tokens: int = 1024) -> Forest:
    """Plain decoding of several sequences that share nothing."""
    return Forest.from_parents([-1] * count, [tokens] * count)


@_family
def long(tokens: int = 65536) -> Forest:
    """Plain decoding of one long sequence."""
    return sequences(1, tokens)


@_family
def forest(trees: int = 8, prompt: int = 500) -> Forest:
    """A batch of requests of different kinds and lengths, as a server meets it."""
    kinds: tuple[Callable[[int], Forest], ...] = (
        lambda context: few_shot(context, branches=8, tokens=40, vary=30),
        lambda context: speculative(nodes=24, context=context),
        lambda context: sequences(1, context),
        lambda context: multi_step(context, levels=2, width=5, tokens=70),
        lambda context: beam(context, beams=4, tokens=50),
        lambda context: _chain(context, drafts=6),
        lambda context: few_shot(context, branches=100, tokens=3, vary=3),
        lambda context: _prefill(context, tokens=20, branches=3),
    )
    picked = (kinds[i % len(kinds)](prompt + 137 * i) for i in range(trees))
    return _side_by_side(list(picked))


@_family
def fasttree(tree: int = 9) -> Forest:
    """A tree of FastTree's published benchmark, by its number from 1 to 15."""
    return published("fasttree", FASTTREE, tree)


@_family
def pat(tree: int = 1) -> Forest:
    """A tree or forest of PAT's published benchmark, by its number from 1 to 20."""
    return published("pat", PAT, tree)


def draft_choices(count: int) -> list[tuple[int, ...]]:
    """The `count` likeliest paths of child ranks, likeliest first, prefixes before what they begin.

    Medusa (Cai et al. 2024, section 2.3.3) adds to its tree, again and again, the path with the
    highest chance to be accepted, the product of the accuracies of its ranks. Accuracies here
    follow a rule: 0.6 for the best token of the first step, times 0.85 for each further step, and
    for the next ranks that divided by (rank + 1)^1.5.

    >>> draft_choices(5)
    [(0,), (0, 0), (1,), (0, 0, 0), (2,)]
    """
    likeliest: list[tuple[float, tuple[int, ...]]] = [(-_accuracy(1, 0), (0,))]
    choices: list[tuple[int, ...]] = []
    while len(choices) < count:
        negative, path = heapq.heappop(likeliest)
        choices.append(path)
        depth, rank = len(path), path[-1]
        child = negative * _accuracy(depth + 1, 0)
        sibling = negative * _accuracy(depth, rank + 1) / _accuracy(depth, rank)
        heapq.heappush(likeliest, (child, (*path, 0)))
        heapq.heappush(likeliest, (sibling, (*path[:-1], rank + 1)))
    return choices


def _accuracy(depth: int, rank: int) -> float:
    return 0.6 * 0.85 ** (depth - 1) / (rank + 1) ** 1.5


def _chain(context: int, drafts: int) -> Forest:
    """A draft without branches: every token is a node and has a row."""
    return Forest.from_choices([(0,) * (i + 1) for i in range(drafts)], context)


def _prefill(context: int, tokens: int, branches: int) -> Forest:
    """Every branch writes its `tokens` at once: as many rows in a node."""
    return Forest.from_parents(
        [-1] + [0] * branches, [context] + [tokens] * branches, [0] + [tokens] * branches
    )


def _side_by_side(trees: Sequence[Forest]) -> Forest:
    first = np.cumsum([0, *(tree.num_nodes for tree in trees)])
    parents = [
        np.where(tree.parents < 0, -1, tree.parents + begin)
        for tree, begin in zip(trees, first[:-1], strict=True)
    ]
    return Forest.from_parents(
        np.concatenate(parents),
        np.concatenate([tree.lengths for tree in trees]),
        np.concatenate([tree.rows for tree in trees]),
    )

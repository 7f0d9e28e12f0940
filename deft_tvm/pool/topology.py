"""The forest above some branches of a pool: found once, filled anew in each step."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from deft_tvm.pages import PageTable
from deft_tvm.pool.nodes import Node, Nodes, above
from deft_tvm.tree import Forest


class Topology(NamedTuple):
    """Who descends from whom, and where the rows are; not how long nodes are, nor where they lie.

    Attributes:
        nodes: those that branches share first, then leaves; drafts left out.
        shape: parents and rows of the forest's nodes; a draft like the one before has the same.
        forest: of this shape. The tokens of a draft come after their leaf, each a node.
    """

    nodes: list[Node]
    shape: tuple[list[int], list[int]]
    forest: Forest

    @classmethod
    def of(cls, leaves: list[Node], rows: list[int], last: Topology | None) -> Topology:
        """That above leaves with so many rows each, with the forest of `last` where it fits."""
        shared = inner(leaves)
        nodes = [*shared, *leaves]
        shape = _shape(nodes, [0] * len(shared) + rows)
        if last is not None and last.shape == shape:
            return cls(nodes, shape, last.forest)
        parents, counts = shape
        return cls(nodes, shape, Forest.from_parents(parents, [0] * len(parents), counts))

    def filled(self, where: Nodes) -> tuple[Forest, PageTable]:
        """The forest with the lengths of now, and where its tokens lie."""
        size = where.ledger.page_size
        lengths, first, indptr = [], [], [0]
        indices = array("i")
        for node in self.nodes:
            lengths.append(node.settled)
            first.append(node.start % size)
            indices.extend(node.pages)
            indptr.append(len(indices))
            if node.draft:
                slots = where.slots(node, node.start + node.settled, node.end)
                lengths += [1] * len(slots)
                first += (slots % size).tolist()
                indptr += range(len(indices) + 1, len(indices) + len(slots) + 1)
                indices.extend((slots // size).tolist())
        pages = PageTable(np.array(indices, np.int32), indptr, first, page_size=size)
        return self.forest.with_lengths(lengths), pages


def inner(leaves: Iterable[Node]) -> dict[Node, None]:
    """All nodes above leaves, each once."""
    found: dict[Node, None] = {}
    for leaf in leaves:
        for node in above(leaf):
            if node in found:
                break
            found[node] = None
    return found


def _shape(nodes: Sequence[Node], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Parents and rows of nodes and of their drafts' tokens, numbered as they come."""
    before = accumulate((1 + len(node.draft) for node in nodes), initial=0)
    number = dict(zip(nodes, before, strict=False))
    parents, counts = [], []
    for node, count in zip(nodes, rows, strict=True):
        parents.append(-1 if node.parent is None else number[node.parent])
        parents += [number[node] + 1 + token for token in node.draft]
        counts += [0] + [1] * len(node.draft) if node.draft else [count]
    return parents, counts

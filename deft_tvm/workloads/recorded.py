"""Trees recorded while a model decoded, read from a JSON file that the user names.

Two formats of the DeFT authors' repository (LINs-lab/DeFT):

* *reasoning*: a list of ``{"incompleted": …, "data": {node: {"id", "value", "start", "end",
  "children"}}}``. A node has ``value`` tokens, one for each decode step from ``start`` to ``end``;
  the root is the prompt, there before step 1. Incomplete trees are skipped.
* *drafts*: ``{"tree_structure": choices, "token_tree_size": …, "records": [{"Accept_length":
  […]}, …]}``, or a list of such. Each record is one request, one accepted length per step.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np

from deft_tvm.errors import TreeError, WorkloadError
from deft_tvm.files import from_json
from deft_tvm.tree import Forest
from deft_tvm.workloads.families import Workload

PROMPT = 1000
"""Tokens before the first draft, which files of drafts do not tell."""


class Recording(ABC):
    """One recorded request: a tree for each decode step, from 1 to `steps`.

    Attributes:
        name: file and place in it.
    """

    name: str

    @property
    @abstractmethod
    def steps(self) -> int:
        """Decode steps that were recorded."""

    @abstractmethod
    def rows(self, step: int) -> int:
        """Query rows of decode step `step`."""

    @abstractmethod
    def _tree(self, step: int) -> Forest: ...

    @property
    def widest(self) -> int:
        """The step with the most rows; of several the last, when most is cached."""
        return max(range(1, self.steps + 1), key=lambda step: (self.rows(step), step), default=1)

    def at(self, step: int) -> Workload:
        """What attention runs on in decode step `step`.

        Raises:
            WorkloadError: `step` is not from 1 to `steps`.
        """
        if not 1 <= step <= self.steps:
            raise WorkloadError(f"{self.name}: step is {step}; expected 1 to {self.steps}")
        return Workload(f"{self.name} at step {step}", self._tree(step), f"recorded: {self.name}")


class Node(msgspec.Struct, frozen=True):
    """A node as the file has it: it grows by a token a step, from `start` to `end`."""

    id: int
    value: int
    start: int
    end: int
    children: list[int]


@dataclass(frozen=True)
class RecordedTree(Recording):
    """A tree that branched and was pruned while it grew.

    A node grows while ``start <= step <= end`` and then has a row, its newest token. Cached are
    the nodes that grow and all above them: a branch that has ended and is not gone on with has
    been pruned.

    Attributes:
        nodes: by their number in the file, parents before children.
        parents: the place of each node's parent in `nodes`, -1 for the root.
    """

    name: str
    nodes: tuple[Node, ...]
    parents: tuple[int, ...]

    @property
    def steps(self) -> int:
        return max(node.end for node in self.nodes)

    def rows(self, step: int) -> int:
        return sum(node.start <= step <= node.end for node in self.nodes)

    def _tree(self, step: int) -> Forest:
        grows = [node.start <= step <= node.end for node in self.nodes]
        live = list(grows)
        for place in reversed(range(1, len(live))):
            live[self.parents[place]] |= live[place]
        number = dict(zip(np.flatnonzero(live).tolist(), range(sum(live)), strict=True))
        return Forest.from_parents(
            [number.get(self.parents[place], -1) for place in number],
            [self._tokens(self.nodes[place], step) for place in number],
            [int(grows[place]) for place in number],
        )

    @staticmethod
    def _tokens(node: Node, step: int) -> int:
        return min(node.end, step) - node.start + 1


@dataclass(frozen=True)
class RecordedDrafts(Recording):
    """A draft tree of one shape, verified step by step under a growing context.

    Attributes:
        choices: paths of child ranks.
        contexts: for each step the tokens in the cache before the draft.
    """

    name: str
    choices: tuple[tuple[int, ...], ...]
    contexts: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.contexts)

    def rows(self, step: int) -> int:
        return 1 + len(self.choices)

    def _tree(self, step: int) -> Forest:
        return Forest.from_choices(self.choices, self.contexts[step - 1])


class _Record(msgspec.Struct):
    accepted: list[int] = msgspec.field(name="Accept_length")


class _Entry(msgspec.Struct):
    """Fields of both formats; `data` of an incomplete tree may be anything."""

    incompleted: bool = False
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    tree_structure: list[tuple[int, ...]] | msgspec.UnsetType = msgspec.UNSET
    records: list[_Record] = []


def load_recorded(path: str | os.PathLike[str], prompt: int = PROMPT) -> list[Recording]:
    """All complete requests of a file of recorded trees, in its order.

    Args:
        path: a JSON file in one of the formats above; which one is seen from its fields.
        prompt: see `PROMPT`.

    Raises:
        WorkloadError: the file is missing, is not JSON, has fields missing or of other types, or
            its nodes or choices are not a tree.
    """
    try:
        entries = from_json(Path(path).read_bytes(), list[_Entry])
        return [found for i, entry in enumerate(entries) for found in _read(path, i, entry, prompt)]
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}; expected a JSON file") from None
    except msgspec.MsgspecError as error:
        raise WorkloadError(f"{path} is no file of recorded trees: {error}") from None


def _read(
    path: str | os.PathLike[str], number: int, entry: _Entry, prompt: int
) -> Iterator[Recording]:
    name = f"{Path(path).name}[{number}]"
    if isinstance(entry.tree_structure, list):
        yield from _drafts(name, entry.tree_structure, entry.records, prompt)
    elif entry.incompleted:
        return
    elif isinstance(entry.data, msgspec.Raw):
        nodes = from_json(bytes(entry.data), dict[str, Node])
        yield _tree(name, list(nodes.values()))
    else:
        raise WorkloadError(f"{name} has neither 'data' nor 'tree_structure'; expected one of them")


def _drafts(
    name: str, choices: list[tuple[int, ...]], records: list[_Record], prompt: int
) -> Iterator[Recording]:
    try:
        Forest.from_choices(choices, prompt)
    except TreeError as error:
        raise WorkloadError(f"{name}: {error}") from None
    for number, record in enumerate(records):
        contexts = tuple(accumulate(record.accepted[:-1], initial=prompt))
        yield RecordedDrafts(f"{name}.records[{number}]", tuple(choices), contexts)


def _tree(name: str, nodes: list[Node]) -> RecordedTree:
    by_id = {node.id: node for node in nodes}
    children = {child for node in nodes for child in node.children}
    roots = [node for node in nodes if node.id not in children]
    if len(roots) != 1 or len(by_id) != len(nodes):
        raise WorkloadError(
            f"{name} has {len(roots)} nodes that are no node's child, and {len(by_id)} ids for "
            f"{len(nodes)} nodes; expected one root, and an id for each"
        )
    for node in nodes:
        _check_node(name, node, by_id)
    order, parents = [roots[0]], [-1]
    for place, node in enumerate(order):  # grows while it is walked: breadth first
        order += [by_id[child] for child in node.children]
        parents += [place] * len(node.children)
        if len(order) > len(nodes):
            break
    if len(order) != len(nodes):
        raise WorkloadError(
            f"{name}: {len(order)} steps down from the root for {len(nodes)} nodes; "
            "expected a tree, each node the child of one"
        )
    return RecordedTree(name, tuple(order), tuple(parents))


def _check_node(name: str, node: Node, by_id: dict[int, Node]) -> None:
    if node.value != node.end - node.start + 1 or node.value < 0:
        raise WorkloadError(
            f"{name}: node {node.id} has {node.value} tokens from step {node.start} to {node.end}; "
            "expected one for each step"
        )
    unknown = [child for child in node.children if child not in by_id]
    if unknown:
        raise WorkloadError(
            f"{name}: node {node.id} has the child {unknown[0]}; expected a node of the file"
        )

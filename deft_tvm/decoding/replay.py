"""Decode with the branching of a tree that was recorded while another model decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.decoding.branch import Branch, Next
from deft_tvm.errors import InputError


class RecordedNode(Protocol):
    """A run of tokens, one for each decode step from `start` to `end`; none if it ends before."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


class Recorded(Protocol):
    """A tree that branched and was pruned, as `deft_tvm.workloads` reads it from files.

    Attributes:
        nodes: parents before their children, and first the prompt, which is there before step 1.
        parents: the place of each node's parent in `nodes`, -1 for the prompt.
    """

    @property
    def nodes(self) -> Sequence[RecordedNode]: ...

    @property
    def parents(self) -> Sequence[int]: ...


class At(NamedTuple):
    """The state of a branch of `Replay`: the node that it ends in, and the step that it is at."""

    node: int
    step: int


class Replay:
    """A control that branches and prunes as a recorded tree did, whatever the model says.

    In each step the nodes that grow have a row; a branch that has ended and is not gone on with is
    pruned. Tokens are the model's likeliest, of the r-th node below another one the r-th likeliest,
    so that siblings differ. Branches that are live at the last step are results.

    Attributes:
        prompt_length: tokens that prompts must have for KV to be as large as recorded.
        first: the step with which replaying begins; the tree as it was before is made at once, of
            tokens that mean nothing, in a step for each level of it.
        last: the step with which it ends.
    """

    def __init__(self, tree: Recorded, *, first: int = 1, last: int | None = None) -> None:
        """All steps of a tree, or some of them.

        Args:
            tree: what was recorded.
            first: see the attributes.
            last: by default the last step that was recorded.

        Raises:
            InputError: the steps are out of range, the prompt is empty, or a node does not begin
                in the step after its parent's end.
        """
        self._nodes, self._parents = tuple(tree.nodes), tuple(tree.parents)
        steps = max(node.end for node in self._nodes)
        self.first, self.last = first, steps if last is None else last
        for name, step in (("first", self.first), ("last", self.last)):
            whole(name, step, InputError)
        if not 1 <= self.first <= self.last <= steps:
            raise InputError(
                f"first is {first} and last is {self.last}; expected steps from 1 to {steps}, "
                "in order"
            )
        self.prompt_length = min(self._nodes[0].end, 0) - self._nodes[0].start + 1
        if self.prompt_length < 1:
            raise InputError(
                f"tree's prompt has {self.prompt_length} tokens before step 1; expected 1 or more"
            )
        self._children: list[list[int]] = [[] for _ in self._nodes]
        for place, (node, parent) in enumerate(zip(self._nodes, self._parents, strict=True)):
            if parent < 0:
                continue
            self._children[parent].append(place)
            if node.start != self._nodes[parent].end + 1:
                raise InputError(
                    f"tree's node {place} begins in step {node.start}; expected "
                    f"{self._nodes[parent].end + 1}, the step after its parent's end"
                )
        self._reach = [node.end for node in self._nodes]
        for place in reversed(range(1, len(self._nodes))):
            parent = self._parents[place]
            self._reach[parent] = max(self._reach[parent], self._reach[place])

    def __call__(self, live: Sequence[Branch], logits: Tensor) -> list[Next]:
        """See `deft_tvm.decoding.Control`."""
        states = [branch.state or At(0, 0) for branch in live]
        step = min(state.step for state in states)
        if step == self.last:
            return [Next(place, (), done=True, state=state) for place, state in enumerate(states)]
        until = self.first - 1 if step < self.first - 1 else step + 1
        nexts = []
        for place, state in enumerate(states):
            ways = [state.node] if state.step == until else list(self._ways(state, until))
            ranked = logits[place].topk(min(len(ways), logits.shape[-1])).indices.tolist()
            for rank, node in enumerate(ways):
                now = min(self._nodes[node].end, until)
                first = ranked[rank % len(ranked)]
                # One token in a step; while the tree is made more, which nobody has chosen.
                tokens = [(first + i) % logits.shape[-1] for i in range(now - state.step)]
                nexts.append(Next(place, tokens, state=At(node, now)))
        return nexts

    def _ways(self, state: At, until: int) -> Iterator[int]:
        """Nodes that a branch goes on in: its own while it grows, else those below that live."""
        if self._nodes[state.node].end > state.step:
            yield state.node
            return
        for child in self._children[state.node]:
            if self._reach[child] < until:
                continue
            if self._nodes[child].end > state.step:
                yield child
            else:
                yield from self._ways(At(child, state.step), until)

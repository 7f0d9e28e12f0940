"""Branches that grow, split and are pruned, and the pages in which their tokens lie.

Integers only: `deft_tvm.PagedKVCache` keeps tensors in step with them. A *branch* is a sequence
that may go on. Branches that began as one share the tokens of that beginning, each node of the tree
once, with all pages that it has.

The token at position p of a path lies in slot ``p % page_size`` of a page. So two siblings never
share a page, and whoever fills a page may go on in it. A fork copies nothing: of the branches that
go on after a half-full page, the first goes on in it, each other one begins a page of its own at
the same slot. The slots before that are for the copy that is put off until the sharers part: when
one of them is left, it takes the shared tokens of the half-full page over, and the page is free.
With that a node never has just one child, and a tree of n branches has fewer than 2 n nodes.
Slots without tokens are those behind a branch's last token, and those before the first in a page
that it began inside: less than two pages for each branch, or three where the one that had gone on
in a half-full page is gone.

>>> pool = PagePool(num_pages=8, page_size=4)
>>> prompt = pool.root()
>>> pool.append({prompt: 6})
>>> other = pool.fork(prompt)[0]
>>> pool.append({prompt: 1, other: 1})
>>> forest, pages = pool.forest({prompt: 1, other: 1})
>>> forest.parents.tolist(), forest.lengths.tolist()
([-1, 0, 0], [6, 1, 1])
>>> pages.page_indices.tolist(), pages.first_slot.tolist()
([0, 1, 1, 2], [0, 2, 2])
>>> pool.prune(prompt)
>>> pool.take_moves()  # tokens 4 and 5, from page 1 to page 2
(array([4, 5]), array([8, 9]))
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deft_tvm.arrays import Int32, read_only, whole
from deft_tvm.errors import PageError
from deft_tvm.pages import PageTable
from deft_tvm.pool.ledger import Ledger
from deft_tvm.pool.nodes import Int64, Node, Nodes, above
from deft_tvm.pool.topology import Topology, inner
from deft_tvm.tree import Forest

ROOT = -1
"""The parent of a draft's first tokens: the end of the branch that it goes on."""


class PagePool:
    """The pages of a cache, and the tree of branches whose tokens lie in them.

    What would need more pages than are free raises `OutOfPages` and changes nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """An empty pool.

        Raises:
            PageError: `num_pages` is negative, or `page_size` no power of two.
        """
        self._ledger = Ledger(num_pages, page_size)
        self._nodes = Nodes(self._ledger)
        self._leaves: dict[int, Node] = {}
        self._next = 0
        self._known: Topology | None = None
        self._wanted: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return (
            f"PagePool(num_pages={self.num_pages}, page_size={self.page_size}, "
            f"free={self.num_free}, branches={len(self._leaves)})"
        )

    @property
    def page_size(self) -> int:
        return self._ledger.page_size

    @property
    def num_pages(self) -> int:
        return self._ledger.num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._ledger.num_free

    @property
    def references(self) -> list[int]:
        """Of each page, how many nodes hold it."""
        return list(self._ledger.references)

    @property
    def branches(self) -> list[int]:
        """All that may go on, the oldest first."""
        return list(self._leaves)

    def length(self, branch: int) -> int:
        """Tokens on the branch's path, those of a draft not counted.

        Raises:
            PageError: there is no such branch.
        """
        leaf = self._leaf(branch)
        return leaf.start + leaf.settled

    def root(self) -> int:
        """A new branch without tokens, of a tree of its own."""
        return self._name(Node(None, 0))

    def fork(self, branch: int, count: int = 1) -> list[int]:
        """New branches that share all tokens of `branch`, which goes on as well.

        Raises:
            PageError: there is no such branch, it has a draft, or `count` is negative.
        """
        if whole("count", count, PageError) < 0:
            raise PageError(f"count is {count}; expected 0 or more new branches")
        leaf = self._settled(branch)
        if count == 0:
            return []
        parent = leaf.parent
        if parent is None or leaf.length:
            parent = leaf
            self._leaves[branch] = self._nodes.below(leaf)
        return [self._name(self._nodes.below(parent)) for _ in range(count)]

    def append(
        self, counts: Mapping[int, int], drafts: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Room for new tokens at the ends of branches, of all of them or, if refused, of none.

        A draft is tokens that are tried, a small tree at the end of a branch. They fill the slots
        after it as they are numbered, so that many small nodes share pages. Until `accept` nothing
        else may happen to the branch, but that it is pruned.

        Args:
            counts: for each branch that grows, by how many tokens.
            drafts: for each other branch that has one, the parents of the draft's tokens: numbers
                of earlier tokens of it, or `ROOT` after the last token of the branch.

        Raises:
            PageError: there is no such branch, it has a draft already or is named in both, a count
                is negative, or a parent no earlier token.
            OutOfPages: there are too few free pages.
        """
        drafts = drafts or {}
        for branch, count in counts.items():
            if whole(f"counts[{branch}]", count, PageError) < 0:
                raise PageError(f"counts[{branch}] is {count!r}; expected 0 or more tokens")
            if branch in drafts:
                raise PageError(f"branch {branch} is in counts and in drafts; expected one of them")
        for branch, parents in drafts.items():
            _check_draft(branch, parents)
        sizes = {branch: len(parents) for branch, parents in drafts.items()}
        grown = {**counts, **sizes}
        self._nodes.grow([(self._settled(branch), count) for branch, count in grown.items()])
        for branch, parents in drafts.items():
            self._nodes.try_out(self._leaves[branch], parents)

    def accept(self, branch: int, path: Sequence[int]) -> None:
        """Keep one path of the branch's draft, from its top, as the branch's newest tokens.

        Args:
            branch: with a draft.
            path: numbers of the draft's tokens, each the parent of the next; none: keep nothing.

        Raises:
            PageError: there is no such branch, or `path` does not lead down its draft.
        """
        leaf = self._leaf(branch)
        last = ROOT
        for place, token in enumerate(path):
            token = whole(f"path[{place}]", token, PageError)
            if not 0 <= token < len(leaf.draft) or leaf.draft[token] != last:
                raise PageError(
                    f"path[{place}] is {token}; expected a token of the draft below {last}"
                )
            last = token
        self._nodes.keep(leaf, path)

    def prune(self, *branches: int) -> None:
        """End branches; what nobody else shares is free.

        Raises:
            PageError: there is no such branch, or it is named twice.
        """
        named = set()
        for branch in branches:
            self._leaf(branch)
            if branch in named:
                raise PageError(f"branch {branch} is named twice; expected each once")
            named.add(branch)
        for branch in branches:
            self._nodes.drop(self._leaves.pop(branch))

    def rewind(self, branch: int, length: int) -> None:
        """Forget all but the first tokens of a branch's path; others that share them keep them.

        Raises:
            PageError: there is no such branch, it has a draft, or it is not that long.
        """
        leaf = self._settled(branch)
        if not 0 <= whole("length", length, PageError) <= leaf.end:
            raise PageError(
                f"length is {length}; expected 0 to {leaf.end}, the tokens of branch {branch}"
            )
        if length >= leaf.start or leaf.parent is None:
            self._nodes.cut(leaf, length)
            return
        self._leaves[branch] = self._nodes.leaf_at(leaf.parent, length)
        self._nodes.drop(leaf)

    def forest(self, rows: Mapping[int, int]) -> tuple[Forest, PageTable]:
        """The trees above some branches, and where their tokens lie.

        Args:
            rows: how many of its newest tokens are queries, for each branch, in the order in which
                rows shall come; of a branch with a draft, all tokens of the draft, whatever is
                said. No more than were appended since the branch was last forked.

        Returns:
            The forest: nodes that branches share, then those of branches and drafts in the order
            of `rows`.

        Raises:
            PageError: there is no such branch, it has fewer tokens of its own, or a number of rows
                is negative.
        """
        for branch, count in rows.items():
            leaf = self._leaf(branch)
            if not (leaf.draft or 0 <= count <= leaf.length):
                raise PageError(
                    f"rows[{branch}] is {count}; expected 0 to {leaf.length}, the tokens that the "
                    "branch has for itself"
                )
        wanted = (self._nodes.version, *rows.items())
        if self._known is None or self._wanted != wanted:
            leaves = [self._leaves[branch] for branch in rows]
            self._known = Topology.of(leaves, list(rows.values()), self._known)
            self._wanted = wanted
        return self._known.filled(self._nodes)

    def slots(self, branch: int) -> Int64:
        """int64[length], slots of the tokens on a branch's path, counted through all pages.

        Raises:
            PageError: there is no such branch.
        """
        leaf = self._leaf(branch)
        parts = [self._nodes.slots(leaf, leaf.start, leaf.start + leaf.settled)]
        parts += [self._nodes.slots(node, node.start, node.end) for node in above(leaf)]
        return np.concatenate(parts[::-1])

    @property
    def moves(self) -> tuple[Int64, Int64]:
        """What `take_moves` would return; nothing is forgotten."""
        moves = self._nodes.moves
        return np.array(list(moves.values()), np.int64), np.array(list(moves), np.int64)

    def take_moves(self) -> tuple[Int64, Int64]:
        """Slots to copy from and to, as if all at once, before any tensor is written or read.

        The pool forgets them. Slots are counted through all pages: slot s of page p is
        ``p * page_size + s``.
        """
        taken = self.moves
        self._nodes.moves = {}
        return taken

    def defragment(self) -> Int32:
        """Bring the pages in use to the front, in depth-first order of what lies in them.

        Returns:
            int32[pages in use], the page that each of them was until now.

        Raises:
            PageError: there are moves that nobody took.
        """
        self._check_settled()
        nodes = list(self._preorder())
        order = list(dict.fromkeys(page for node in nodes for page in node.pages))
        number = {page: place for place, page in enumerate(order)}
        for node in nodes:
            node.pages = array("i", [number[page] for page in node.pages])
        self._ledger.renumber(order)
        return read_only(np.array(order, np.int32))

    def resize(self, num_pages: int) -> None:
        """Have more pages, or fewer.

        Raises:
            PageError: `num_pages` is negative, a page that would go is in use, or there are moves
                that nobody took.
        """
        self._check_settled()
        self._ledger.resize(num_pages)

    def _check_settled(self) -> None:
        if self._nodes.moves:
            raise PageError("there are moves that nobody took; expected take_moves before")

    def _leaf(self, branch: int) -> Node:
        if branch not in self._leaves:
            raise PageError(f"branch is {branch!r}; expected one of {_some(self._leaves)}")
        return self._leaves[branch]

    def _settled(self, branch: int) -> Node:
        leaf = self._leaf(branch)
        if leaf.draft:
            raise PageError(f"branch {branch} has a draft; expected accept before anything else")
        return leaf

    def _name(self, leaf: Node) -> int:
        branch, self._next = self._next, self._next + 1
        self._leaves[branch] = leaf
        return branch

    def _preorder(self) -> Iterator[Node]:
        nodes = [*inner(self._leaves.values()), *self._leaves.values()]
        waiting = [node for node in reversed(nodes) if node.parent is None]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)


def _check_draft(branch: int, parents: Sequence[int]) -> None:
    for token, parent in enumerate(parents):
        if not ROOT <= whole(f"drafts[{branch}][{token}]", parent, PageError) < token:
            raise PageError(
                f"drafts[{branch}][{token}] is {parent}; expected an earlier token of the draft, "
                f"or {ROOT}"
            )


def _some(branches: Mapping[int, Node]) -> str:
    names = [str(branch) for branch in branches]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "none, there are no branches"

"""Nodes of growing trees, whose tokens lie in pages: cut, joined and split as branches come and go.

See `deft_tvm.pool.pool` for what stays true of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deft_tvm.pool.ledger import Ledger

Int64 = NDArray[np.int64]


class Node:
    """Tokens that the same branches share.

    Attributes:
        parent: None at the beginning of a tree.
        children: none, or two and more.
        pages: int32, those with tokens of the node; it shares the first with its parent where it
            begins inside a page that the parent half filled.
        start: position of the node's first token.
        length: tokens of the node.
        draft: parents of the last tokens, which are a tree and not yet part of the path, each the
            number of an earlier one or `ROOT`.
    """

    __slots__ = ("children", "draft", "length", "pages", "parent", "start")

    def __init__(self, parent: Node | None, start: int) -> None:
        self.parent = parent
        self.children: list[Node] = []
        self.pages = array("i")
        self.start = start
        self.length = 0
        self.draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def settled(self) -> int:
        """Tokens that are part of the path."""
        return self.length - len(self.draft)


class Nodes:
    """The nodes of all trees of a pool, the pages that they hold, and the copies that they want.

    Attributes:
        ledger: who holds which pages.
        moves: for each slot that is to be copied to, the slot to copy from, all as if at once.
        version: another number after each change of who descends from whom.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.moves: dict[int, int] = {}
        self.version = 0

    def below(self, parent: Node) -> Node:
        """A new empty leaf at the end of a node."""
        node = Node(parent, parent.end)
        parent.children.append(node)
        self.version += 1
        return node

    def try_out(self, leaf: Node, parents: Sequence[int]) -> None:
        """The newest tokens of a leaf are a draft; see `deft_tvm.pool.PagePool.append`."""
        leaf.draft = tuple(parents)
        self.version += 1

    def keep(self, leaf: Node, path: Sequence[int]) -> None:
        """Of a leaf's draft only these tokens, which are numbered as in it."""
        base = leaf.start + leaf.settled
        slots = self.slots(leaf, base, leaf.end)
        leaf.draft = ()
        self.move(slots[np.array(path, np.intp)], slots[: len(path)])
        self.cut(leaf, base + len(path))
        self.version += 1

    def grow(self, grown: list[tuple[Node, int]]) -> None:
        """Room for so many more tokens in leaves.

        Raises:
            OutOfPages: there are too few free pages; nothing was changed.
        """
        ledger, size = self.ledger, self.ledger.page_size
        growing = [(leaf, count) for leaf, count in grown if count]
        entered: dict[int, Node] = {}
        missing = []
        for leaf, count in growing:
            page = None if leaf.length else self._half_full(leaf)
            enters = page is not None and entered.setdefault(page, leaf) is leaf
            pages = -(-(leaf.end + count) // size) - leaf.start // size
            missing.append(pages - len(leaf.pages) - enters)
        ledger.demand(sum(missing))
        for page, leaf in entered.items():
            ledger.hold(page)
            leaf.pages.append(page)
        for (leaf, count), number in zip(growing, missing, strict=True):
            if number:
                if leaf.pages:
                    ledger.filled[leaf.pages[-1]] = size
                leaf.pages.extend(ledger.take(number))
            leaf.length += count
            self._mark_end(leaf)

    def _half_full(self, leaf: Node) -> int | None:
        """The page in which an empty leaf may go on after the node above it."""
        slot = leaf.start % self.ledger.page_size
        if leaf.parent is None or slot == 0:
            return None
        page = leaf.parent.pages[-1]
        return page if self.ledger.filled[page] == slot else None

    def slots(self, node: Node, begin: int, end: int) -> Int64:
        """Where the tokens from one position of the path to another lie, all of them in `node`."""
        size = self.ledger.page_size
        at = np.arange(begin, end, dtype=np.int64)
        pages = np.array(node.pages, np.int64)
        return pages[at // size - node.start // size] * size + at % size

    def move(self, source: Int64, target: Int64) -> None:
        """Copy later, as if at once with what is to be copied already."""
        origins = [self.moves.get(slot, slot) for slot in source.tolist()]
        for slot, origin in zip(target.tolist(), origins, strict=True):
            self.moves.pop(slot, None)
            if slot != origin:
                self.moves[slot] = origin

    def cut(self, leaf: Node, end: int) -> None:
        """Let a leaf end at a position that is not before its start."""
        size, ledger = self.ledger.page_size, self.ledger
        length = end - leaf.start
        if length == leaf.length:
            return
        keep = -(-end // size) - leaf.start // size if length else 0
        for place in reversed(range(keep, len(leaf.pages))):
            ledger.release(leaf.pages[place], leaf.start % size if place == 0 else 0)
        del leaf.pages[keep:]
        leaf.length = length
        self._mark_end(leaf)

    def _mark_end(self, leaf: Node) -> None:
        """The last page of a leaf is filled up to the leaf's end."""
        if leaf.length:
            self.ledger.filled[leaf.pages[-1]] = (leaf.end - 1) % self.ledger.page_size + 1

    def drop(self, leaf: Node) -> None:
        """Take a leaf out of its tree."""
        self.version += 1
        self.cut(leaf, leaf.start)
        parent = leaf.parent
        if parent is None:
            return
        parent.children.remove(leaf)
        if len(parent.children) == 1:
            self._join(parent, parent.children[0])

    def _join(self, node: Node, child: Node) -> None:
        """Make one node of two, `child`, where it is the only one below `node`."""
        size, ledger = self.ledger.page_size, self.ledger
        slot, pages = child.start % size, node.pages
        if child.length and node.length and slot:
            half = pages.pop()
            if half == child.pages[0]:
                ledger.references[half] -= 1
            else:
                first = max(node.start, child.start - slot)
                shared = np.arange(first, child.start) % size
                self.move(half * size + shared, child.pages[0] * size + shared)
                ledger.release(half, first % size)
        child.pages = pages + child.pages
        child.start, child.length = node.start, node.length + child.length
        _put_in_place(child, node)

    def leaf_at(self, node: Node, position: int) -> Node:
        """A new empty leaf after the first tokens of the path to the end of `node`."""
        while node.parent is not None and node.start >= position:
            node = node.parent
        if position == node.end:
            return self.below(node)
        if position == 0:
            return Node(None, 0)
        upper = Node(None, node.start)
        size = self.ledger.page_size
        count = -(-position // size) - node.start // size
        upper.pages, rest = node.pages[:count], node.pages[position // size - node.start // size :]
        if position % size:
            self.ledger.hold(rest[0])
        upper.length, node.length = position - node.start, node.end - position
        node.pages, node.start = rest, position
        _put_in_place(upper, node)
        node.parent = upper
        upper.children.append(node)
        return self.below(upper)


def _put_in_place(node: Node, other: Node) -> None:
    """Let `node` be where `other` is among the children of its parent."""
    node.parent = other.parent
    if other.parent is not None:
        siblings = other.parent.children
        siblings[siblings.index(other)] = node


def above(leaf: Node) -> Iterator[Node]:
    """The nodes above, the nearest first."""
    node = leaf.parent
    while node is not None:
        yield node
        node = node.parent

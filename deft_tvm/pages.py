"""Where the tokens of each node lie in a paged KV cache.

A node's tokens fill its pages one after another, from a slot of the first. Nodes may share a page
where their slots are apart, so that a draft of many small nodes takes few pages::

    page 8          page 3          page 5
    [0 0 0 0]       [0 0 1 1]       [1 2 . .]

>>> forest = Forest.from_parents(parents=[-1, 0, 0], lengths=[6, 3, 1])
>>> pages = PageTable([8, 3, 3, 5, 5], [0, 2, 4, 5], first_slot=[0, 2, 1], page_size=4)
>>> pages.check(forest)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deft_tvm.arrays import Int32, consecutive, int32_array, whole
from deft_tvm.errors import PageError
from deft_tvm.tree import Forest

CONTIGUOUS_SIZE = 1 << 30
"""Slots of the one page that stands for a cache without pages."""


class Room(NamedTuple):
    """How long each node may grow within the pages that it reached when it was checked.

    Attributes:
        lengths: int64[nodes]; 0 before the first check.
        address: of the first one, which takes longer to ask for than a plan to make.
    """

    lengths: NDArray[np.int64]
    address: int

    @classmethod
    def of(cls, lengths: NDArray[np.int64]) -> Room:
        return cls(lengths, lengths.ctypes.data)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, has an address of its own."""
        return Room.of, (self.lengths,)


class PageTable:
    """The pages of each node: integers only, int32 and read-only.

    Token ``t`` of node ``n`` lies in slot ``x % page_size`` of page
    ``page_indices[page_indptr[n] + x // page_size]``, where ``x = first_slot[n] + t``. A node may
    have more pages than its tokens fill.

    Attributes:
        page_indices: int32[P], numbers of pages in the cache, node after node.
        page_indptr: int32[nodes + 1], where in `page_indices` the pages of each node begin.
        first_slot: int32[nodes], slot of the node's first token in its first page.
        page_size: tokens a page, a power of two.
        is_contiguous: made by `contiguous`, so that the cache has tokens where others have pages.
        max_page: the highest page number, -1 if there is none; the cache must have it.
        room: for what lengths `check` has nothing to look at.
    """

    def __init__(
        self,
        page_indices: ArrayLike,
        page_indptr: ArrayLike,
        first_slot: ArrayLike | None = None,
        *,
        page_size: int,
    ) -> None:
        """Takes the attributes of the same names; `first_slot` is 0 everywhere by default.

        Raises:
            PageError: an argument is out of range or does not fit the others. Whether the tokens
                of a forest fit is a matter of `check`.
        """
        self.page_size = page_size = whole("page_size", page_size, PageError)
        if page_size < 1 or page_size & (page_size - 1):
            raise PageError(f"page_size is {page_size}; expected a power of two")
        self.page_indices = int32_array("page_indices", page_indices, None, PageError)
        self.page_indptr = int32_array("page_indptr", page_indptr, None, PageError)
        num_nodes = max(len(self.page_indptr) - 1, 0)
        slots = np.zeros(num_nodes, np.int32) if first_slot is None else first_slot
        self.first_slot = int32_array("first_slot", slots, num_nodes, PageError)
        self.max_page = int(self.page_indices.max(initial=-1))
        self.is_contiguous = page_size == CONTIGUOUS_SIZE
        if page_size >= CONTIGUOUS_SIZE:
            one_page = self.page_indices.tolist() == [0] and not self.page_indptr.any()
            if not (self.is_contiguous and one_page):
                raise PageError(f"page_size is {page_size}; expected less than 2^30")
        self.room = Room.of(np.zeros(num_nodes, np.int64))
        _check_indptr(self.page_indptr, len(self.page_indices))
        _check_range("page_indices", self.page_indices, 2**31)
        _check_range("first_slot", self.first_slot, page_size)

    @classmethod
    def contiguous(cls, forest: Forest) -> PageTable:
        """The table of a cache ``[tokens, heads, width]``, nodes back to back in caller's order.

        It is one page of 2^30 slots: every node starts in page 0, at the slot of its first token.

        Raises:
            PageError: the forest has more than 2^30 tokens.
        """
        if forest.num_tokens > CONTIGUOUS_SIZE:
            raise PageError(f"forest has {forest.num_tokens} tokens; expected at most 2^30")
        indptr = np.zeros(forest.num_nodes + 1, np.int32)
        return cls([0], indptr, _offsets(forest), page_size=CONTIGUOUS_SIZE)

    @property
    def num_nodes(self) -> int:
        return len(self.first_slot)

    @property
    def num_pages(self) -> int:
        return len(self.page_indices)

    @property
    def page_shift(self) -> int:
        """log2 of the page size."""
        return self.page_size.bit_length() - 1

    def __repr__(self) -> str:
        if self.is_contiguous:
            return f"PageTable.contiguous(nodes={self.num_nodes})"
        return (
            f"PageTable(nodes={self.num_nodes}, pages={self.num_pages}, page_size={self.page_size})"
        )

    def row_slots(self, forest: Forest) -> NDArray[np.int64]:
        """int64[rows], the slot of each row's own token, rows in the caller's order.

        Slots are counted through all pages: slot s of page p is ``p * page_size + s``. Each node
        with rows must have tokens.
        """
        node = np.repeat(np.arange(forest.num_nodes), forest.rows)
        token = consecutive(forest.lengths - forest.rows, forest.rows)
        place = self.first_slot[node] + token
        page = self.page_indices[self.page_indptr[node] + place // self.page_size]
        return page * np.int64(self.page_size) + place % self.page_size

    def check(self, forest: Forest) -> None:
        """That every token of `forest` has a slot, and no two the same.

        Raises:
            PageError: the table is for another number of nodes, a node is longer than its pages,
                or two nodes overlap in a page.
        """
        if self.num_nodes != forest.num_nodes:
            raise PageError(
                f"page_indptr has {len(self.page_indptr)} entries; expected one more than the "
                f"forest has nodes, which is {forest.num_nodes}"
            )
        if self.is_contiguous:
            self._check_offsets(forest)
        elif (forest.lengths > self.room.lengths).any():
            filled = self._pages_filled(forest)
            self.room = Room.of(self._check_overlap(forest, filled))

    def _check_offsets(self, forest: Forest) -> None:
        wrong = np.flatnonzero(self.first_slot != _offsets(forest))
        if wrong.size:
            raise PageError(
                f"first_slot[{wrong[0]}] is {self.first_slot[wrong[0]]}, but the nodes before it "
                f"have {_offsets(forest)[wrong[0]]} tokens; expected PageTable.contiguous(forest)"
            )

    def _pages_filled(self, forest: Forest) -> NDArray[np.int64]:
        """How many of its pages each node's tokens reach."""
        filled = -(-self._end(forest) // self.page_size)
        held = self.page_indptr[1:] - self.page_indptr[:-1]
        past = (filled > held).nonzero()[0]
        if past.size:
            n = past[0]
            raise PageError(
                f"node {n} has {forest.lengths[n]} tokens from slot {self.first_slot[n]} on; "
                f"expected no more than its {held[n]} pages of {self.page_size} hold"
            )
        return filled

    def _check_overlap(self, forest: Forest, filled: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sorted by first slot, the stretch that a node takes of a page ends before the next.

        Returns:
            int64[nodes], the length at which each node reaches the end of its last page, or what
            other nodes have there; 0 for a node without tokens.
        """
        pages = self.page_indices[consecutive(self.page_indptr[:-1], filled)].astype(np.int64)
        begin = pages * self.page_size
        end = begin + self.page_size
        some = filled.nonzero()[0]
        after = filled[some].cumsum()
        last, first = after - 1, after - filled[some]
        begin[first] += self.first_slot[some]
        page_end = end[last]
        end[last] -= (filled * self.page_size - self._end(forest))[some]
        order = begin.argsort()
        following = begin[order[1:]]
        clash = (end[order[:-1]] > following).nonzero()[0]
        if clash.size:
            pair = order[clash[0] : clash[0] + 2]
            one, other = sorted(np.repeat(np.arange(self.num_nodes), filled)[pair].tolist())
            raise PageError(
                f"page {pages[pair[0]]} is shared by nodes {one} and {other} in overlapping slots; "
                "expected a slot for each token"
            )
        limit = np.full_like(begin, np.iinfo(np.int64).max)
        limit[order[:-1]] = following
        room = np.zeros_like(filled)
        room[some] = forest.lengths[some] + np.minimum(limit[last], page_end) - end[last]
        return room

    def _end(self, forest: Forest) -> NDArray[np.int64]:
        """Slot after a node's last token, counted from its first page; 0 without tokens."""
        end = self.first_slot.astype(np.int64) + forest.lengths
        return end * (forest.lengths > 0)


def _offsets(forest: Forest) -> Int32:
    """Tokens of the nodes before each node, in the caller's order."""
    return np.cumsum(forest.lengths, dtype=np.int32) - forest.lengths


def _check_indptr(indptr: Int32, num_pages: int) -> None:
    if len(indptr) == 0:
        raise PageError("page_indptr is empty; expected one entry more than there are nodes")
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if falls.size:
        n = falls[0]
        raise PageError(
            f"page_indptr[{n + 1}] is {indptr[n + 1]}, after {indptr[n]}; expected it not to fall"
        )
    if indptr[0] < 0 or indptr[-1] > num_pages:
        raise PageError(
            f"page_indptr goes from {indptr[0]} to {indptr[-1]}; expected it within "
            f"page_indices, which has {num_pages} entries"
        )


def _check_range(name: str, values: NDArray[Any], limit: int) -> None:
    outside = np.flatnonzero((values < 0) | (values >= limit))
    if outside.size:
        n = outside[0]
        below = "" if limit == 2**31 else f" and less than {limit}"
        raise PageError(f"{name}[{n}] is {values[n]}; expected 0 or more{below}")

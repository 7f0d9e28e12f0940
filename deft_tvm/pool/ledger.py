"""Which pages of a cache are in use, by how many nodes, and how far each is filled."""

from __future__ import annotations

from collections.abc import Iterable

from deft_tvm.arrays import whole
from deft_tvm.errors import OutOfPages, PageError


class Ledger:
    """Reference counts of pages; a page is free when nobody holds it.

    Attributes:
        page_size: tokens a page.
        references: how many nodes hold each page.
        filled: of each page in use the slot after its last token.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size = whole("page_size", page_size, PageError)
        if page_size < 1 or page_size & (page_size - 1):
            raise PageError(f"page_size is {page_size}; expected a power of two")
        self.references: list[int] = []
        self.filled: list[int] = []
        # A stack: pages that were just freed are the likeliest to be in a processor's cache.
        self._free: list[int] = []
        self.resize(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self.references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def demand(self, count: int) -> None:
        """Refuse what `take` could not give.

        Raises:
            OutOfPages: there are fewer free pages.
        """
        if count > len(self._free):
            raise OutOfPages(
                f"{count} more pages are needed and {len(self._free)} of num_pages="
                f"{self.num_pages} are free; prune branches, or give the pool more pages"
            )

    def take(self, count: int) -> list[int]:
        """Free pages, one or more, each held once and full, as all are but a node's last."""
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self.references[page] = 1
            self.filled[page] = self.page_size
        return pages

    def hold(self, page: int) -> None:
        """Another node has tokens in `page`."""
        self.references[page] += 1

    def release(self, page: int, first_slot: int) -> None:
        """A node gives up `page`, in which its tokens, the last there are, begin at a slot.

        Args:
            page: in use.
            first_slot: what is before it belongs to others, if anybody holds the page still.
        """
        self.references[page] -= 1
        if self.references[page]:
            self.filled[page] = first_slot
        else:
            self._free.append(page)

    def resize(self, num_pages: int) -> None:
        """Have so many pages.

        Raises:
            PageError: `num_pages` is negative, or a page that would go is in use.
        """
        num_pages = whole("num_pages", num_pages, PageError)
        if num_pages < 0:
            raise PageError(f"num_pages is {num_pages}; expected 0 or more")
        used = next((p for p in reversed(range(self.num_pages)) if self.references[p]), -1)
        if num_pages <= used:
            raise PageError(
                f"num_pages is {num_pages} and page {used} is in use; expected more than that, "
                "or a pool that was defragmented"
            )
        before = self.num_pages
        new = range(before, num_pages)
        self._free = [*reversed(new), *(p for p in self._free if p < num_pages)]
        for array in (self.references, self.filled):
            del array[num_pages:]
            array.extend([0] * len(new))

    def renumber(self, order: Iterable[int]) -> None:
        """Let page ``order[i]`` be page i from now on; these must be all that are in use."""
        kept = list(order)
        rest = self.num_pages - len(kept)
        self.references = [self.references[page] for page in kept] + [0] * rest
        self.filled = [self.filled[page] for page in kept] + [0] * rest
        self._free = list(reversed(range(len(kept), self.num_pages)))

"""The planner that every module brings along, compiled from `deft_tvm/native/planner`.

In Python a plan takes some six hundred calls, whose code and objects have left the caches whenever
a model has run in between: a millisecond and more, where a small step's attention takes half of
one. Compiled it takes microseconds. It makes the plans by which most decode, those of `GROUPINGS`
without a window, bit for bit as `deft_tvm.plan.planner` does, which makes all others and is its
oracle.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from deft_tvm.plan.buffer import FIXED, INT32, INT64, PlanBuffer
from deft_tvm.plan.cost import Prices

if TYPE_CHECKING:
    import tvm_ffi

    from deft_tvm.pages import PageTable
    from deft_tvm.tree import Forest

GROUPINGS = ("packed", "sequence", "auto")
"""Those that it makes, numbered as in ``native/planner``."""
FUNCTION = "plan"
"""Its name in a module."""

_BEFORE_LAYOUT = 3
"""Numbers that the planner tells: the grouping, the size of what kernels read, and of all."""
_UNCHECKED = -2
"""Its answer where a node is longer than its pages were found to hold."""


class _Struct(ctypes.Structure):
    """As `planner/native.h` has it: integers, then arrays, then seconds."""

    numbers: ClassVar[list[str]]
    arrays: ClassVar[list[str]]

    @classmethod
    def of(cls, source: object) -> _Struct:
        """The fields of `source`, which must outlive it; its arrays are contiguous and of the
        types that the header names."""
        made = cls()
        for name in cls.numbers:
            setattr(made, name, getattr(source, name))
        for name in cls.arrays:
            setattr(made, name, getattr(source, name).__array_interface__["data"][0])
        return made


def _struct(integers: str, arrays: str, seconds: str = "") -> type[_Struct]:
    kinds = (ctypes.c_int64, integers), (ctypes.c_void_p, arrays), (ctypes.c_double, seconds)
    fields = [(name, kind) for kind, names in kinds for name in names.split()]
    numbers = f"{integers} {seconds}".split()
    return type(
        "_Struct", (_Struct,), {"numbers": numbers, "arrays": arrays.split(), "_fields_": fields}
    )


_FOREST = _struct(
    "num_nodes num_rows",
    "parents lengths rows preorder position subtree_end row_begin row_end row_order start diagonal",
)
_PAGES = _struct(
    "num_nodes is_contiguous page_shift num_pages max_page", "page_indices page_indptr first_slot"
)
_PRICES = _struct(
    "classes cores most_rows row_step longest joins",
    "kv_tile cut_steps units step_seconds fixed_seconds",
    "token_seconds partial_seconds launch_seconds",
)


class Compiled:
    """The planner of one module, for one spec's prices."""

    def __init__(self, function: tvm_ffi.Function, prices: Prices, grouping: str) -> None:
        """Takes a module's function named `FUNCTION`, what items cost, and one of `GROUPINGS`."""
        self._function = function
        self._source, self._prices = prices, _PRICES.of(prices)
        self._address = ctypes.addressof(self._prices)
        self._grouping = GROUPINGS.index(grouping)
        self._scratch = _Scratch(prices.classes)

    def __call__(self, forest: Forest, pages: PageTable) -> PlanBuffer:
        """The arrays of a plan.

        Args:
            forest: no part of another, or without a window.
            pages: that hold its tokens.

        Raises:
            PageError: `pages` does not hold the tokens of `forest`.
            MemoryError: there is no room for the plan's working arrays.
        """
        scratch = self._scratch
        if pages.is_contiguous:  # where each node begins has to be looked at every time
            pages.check(forest)
        while True:
            room = pages.room
            needed = self._function(
                _address_of(forest, _FOREST),
                _address_of(pages, _PAGES),
                room.address,
                self._address,
                self._grouping,
                scratch.address,
                scratch.room,
                scratch.address_of_sizes,
            )
            if not needed:
                grouping, size, total = scratch.sizes[:_BEFORE_LAYOUT]
                layout = scratch.sizes[_BEFORE_LAYOUT:]
                return PlanBuffer(scratch.out[:total], size, layout, GROUPINGS[grouping])
            if needed == _UNCHECKED:
                pages.check(forest)
            elif needed < 0:
                raise MemoryError("no memory is left to plan in")
            else:
                scratch.grow(needed + needed // 4)


class _Scratch(threading.local):
    """What the planner writes to, each thread its own, since two may plan at once.

    Arrays of Python's own: where a model has run in between, numpy's code for a slice comes out of
    memory, which takes longer than all that is planned.
    """

    def __init__(self, classes: int) -> None:
        self.sizes = array(INT64, [0]) * (_BEFORE_LAYOUT + FIXED + classes)
        self.address_of_sizes, _ = self.sizes.buffer_info()
        self.grow(1 << 12)

    def grow(self, room: int) -> None:
        self.room, self.out = room, array(INT32, [0]) * room
        self.address, _ = self.out.buffer_info()


_structs: WeakKeyDictionary[object, tuple[_Struct, int]] = WeakKeyDictionary()


def _address_of(source: Forest | PageTable, struct: type[_Struct]) -> int:
    """Of the structure by which C sees `source`; made once for each."""
    found = _structs.get(source)
    if found is None:
        made = struct.of(source)
        # Of two threads that come at once the first one's stays, for both.
        found = _structs.setdefault(source, (made, ctypes.addressof(made)))
    return found[1]

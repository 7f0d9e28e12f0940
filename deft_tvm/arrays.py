"""Integers from callers, checked and frozen, and the ranges that arrays of them describe."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deft_tvm.errors import DeftError, TreeError

Int32 = NDArray[np.int32]


def whole(name: str, value: Any, error: type[DeftError]) -> int:
    """`value` as Python's own int; raises `error` where it is no integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise error(f"{name} is {value!r}; expected an integer") from None


def int32_array(name: str, values: ArrayLike, size: int | None, error: type[DeftError]) -> Int32:
    """A read-only int32[size] copy of `values`; raises `error` where they are not that."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int32)  # an empty list becomes float64
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise error(
            f"{name} is {array.dtype} of shape {array.shape}; expected integers, one per entry"
        )
    if size is not None and len(array) != size:
        raise error(f"{name} has {len(array)} entries; expected {size}")
    copy = array.astype(np.int32)
    wrapped = np.flatnonzero(copy != array)
    if wrapped.size:
        raise error(f"{name}[{wrapped[0]}] is {array[wrapped[0]]}; expected what fits 32 bits")
    return read_only(copy)


def offsets(counts: NDArray[Any]) -> NDArray[np.intp]:
    """intp[n + 1], where ranges of the given lengths begin that lie end to end, and the end.

    >>> offsets(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    begins = np.zeros(len(counts) + 1, np.intp)
    counts.cumsum(out=begins[1:])
    return begins


def consecutive(begin: NDArray[Any], count: NDArray[Any]) -> NDArray[np.intp]:
    """``begin[i], begin[i] + 1, ...``, ``count[i]`` numbers of each, one range after another.

    >>> consecutive(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    ends = count.cumsum(dtype=np.intp)
    return np.arange(ends[-1] if len(ends) else 0) + (begin + count - ends).repeat(count)


def read_only(array: NDArray[Any]) -> Int32:
    array = np.ascontiguousarray(array, np.int32)
    array.flags.writeable = False
    return array


def check_counts(name: str, values: Int32) -> None:
    below = np.flatnonzero(values < 0)
    if below.size:
        raise TreeError(f"{name}[{below[0]}] is {values[below[0]]}; expected 0 or more")
    total = int(values.sum(dtype=np.int64))
    if total >= 2**31:
        raise TreeError(f"{name} add up to {total}; expected less than 2^31")

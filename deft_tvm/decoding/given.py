"""What callers give, as Python's own integers."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

from deft_tvm.errors import InputError


def tokens_of(name: str, tokens: Iterable[Any]) -> tuple[int, ...]:
    """Tokens in whatever they came, a list, an array or a tensor.

    Raises:
        InputError: they are no collection, or not all of them are integers.
    """
    try:
        return tuple(map(operator.index, tokens))
    except TypeError:
        raise InputError(
            f"{name} is {reprlib.repr(tokens)}; expected a collection of integers"
        ) from None

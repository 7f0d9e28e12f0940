"""What a stage is: a piece of TensorIR that the partial kernel puts in its place.

Blocks are named by what they compute: schedules address them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tvm.script import tirx as T


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """TensorIR that is parsed where it is called.

    ``T.inline`` counts its calls and numbers block names by them, over all kernels of the process;
    a fresh one for each call keeps the names.
    """

    @wraps(function)
    def placed(*args: Any) -> None:
        return T.inline(function)(*args)

    return placed

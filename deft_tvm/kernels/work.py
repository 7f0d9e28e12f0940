"""The outermost loop of a kernel: which machine construct runs its independent pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.script import tirx as T


def work_loop(kind: str) -> Callable[[Any], Any]:
    """The loop over pieces of work for a target of `kind`.

    It stands in the computation since no primitive may bind it: TVM must prove that iterations
    write apart before it does, and which rows a work item writes is data.
    """
    return T.parallel if kind == "llvm" else partial(T.thread_binding, thread="blockIdx.x")

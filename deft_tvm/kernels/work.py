"""A kernel from outside: the loop over its independent pieces, and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.buffer import is_buffer_var


def work_loop(kind: str) -> Callable[[Any], Any]:
    """The loop over pieces of work for a target of `kind`.

    It stands in the computation since no primitive may bind it: TVM must prove that iterations
    write apart before it does, and which rows a work item writes is data.
    """
    return T.parallel if kind == "llvm" else partial(T.thread_binding, thread="blockIdx.x")


TASKS_PER_THREAD = 32
"""As in `native/torch_pool.c`: a parallel loop is cut into so many ranges for each thread."""


def range_size(units: Any, threads: int) -> Any:
    """Units of one range."""
    return (units + (TASKS_PER_THREAD * threads - 1)) // (TASKS_PER_THREAD * threads)


def following(work: Any, units: Any, size: Any, threads: int) -> Any:
    """The unit that the thread of `work` most likely takes next; the last one's is itself.

    Ranges of `size` are dealt out one by one: after its own a thread takes the one that so many
    threads further on begins.
    """
    over = T.Select((work + 1) % size == 0, (threads - 1) * size, 0)
    return T.min(work + 1 + over, units - 1)


OF_PLAN = "deft_tvm.binds_plan"
"""Attribute of a kernel that binds, before anything else, only what is of the plan: no kernel
before it in a step writes that."""


def used_parameters(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """`kernel` without the handles of tensors that its spec does not have."""
    used = [parameter for parameter in kernel.params if is_buffer_var(parameter)]
    return tirx.PrimFunc(used, kernel.body, kernel.ret_type, kernel.attrs)

"""Kernels that are launched while the one before still runs (CUDA programming guide, "programmatic
dependent launch").

A step is two or three short kernels, and between each pair the GPU would be idle for a
microsecond or two. From Hopper on a kernel's blocks may take their places as soon as all of the
kernel before have theirs; they then wait until it has ended and what it wrote can be seen. All
kernels here let the next one begin so, and wait before anything else.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import takewhile
from typing import Any

from tvm import tirx, transform
from tvm.script import tirx as T

OVERLAPPED = "tirx.use_programtic_dependent_launch"
"""TVM's name (and spelling) of the tag among a kernel's launch parameters."""
LAUNCH_PARAMETERS = "tirx.kernel_launch_params"
FIRST_MAJOR = 9

SUCCEED = """
__device__ __forceinline__ void deft_succeed() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
"""
"""The wait comes first: so whoever waits for this kernel has waited for those before it, too."""


def can_overlap(arch: str) -> bool:
    """Whether GPUs of ``sm_90a`` and the like can."""
    return int(arch.removeprefix("sm_").rstrip("af")) // 10 >= FIRST_MAJOR


def overlap_launches(of_plan: Set[str]) -> transform.Pass:
    """The pass that lets functions of the device be launched early, where they can be, and wait.

    Args:
        of_plan: names of those with `work.OF_PLAN`, which splitting host from device leaves
            behind. They wait after these binds: the first of a step has waited for who wrote
            the plan.
    """

    @tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.OverlapLaunches")
    def overlap(
        func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
    ) -> tirx.PrimFunc:
        tags = (func.attrs or {}).get(LAUNCH_PARAMETERS)
        if tags is None or not can_overlap(str(func.attrs["target"].attrs["arch"])):
            return func
        name = str(func.attrs["global_symbol"]).removesuffix("_kernel")
        begun = func.with_body(_waiting(func.body, name in of_plan))
        if name in of_plan:
            # What is read after the wait is not what never changes while the kernel runs.
            begun = begun.with_attr("tirx.noalias", False)
        # The tag of shared memory is the last one.
        return begun.with_attr(LAUNCH_PARAMETERS, [OVERLAPPED, *tags])

    return overlap


def _waiting(body: tirx.Stmt, after_binds: bool) -> tirx.Stmt:
    """`body` with the wait before it, or after its first statements that only bind."""
    wait = tirx.Evaluate(T.cuda.func_call("deft_succeed", source_code=SUCCEED))
    if not after_binds:
        return tirx.SeqStmt([wait, body])
    if isinstance(body, tirx.AttrStmt):
        return tirx.AttrStmt(body.node, body.attr_key, body.value, _waiting(body.body, True))
    if isinstance(body, tirx.SeqStmt):
        binds = list(takewhile(_only_binds, body.seq))
        others = list(body.seq)[len(binds) :]
        if len(others) == 1:
            return tirx.SeqStmt([*binds, _waiting(others[0], True)])
        return tirx.SeqStmt([*binds, wait, *others])
    return tirx.SeqStmt([wait, body])


def _only_binds(statement: tirx.Stmt) -> bool:
    return isinstance(statement, (tirx.Bind, tirx.AllocBuffer, tirx.DeclBuffer))

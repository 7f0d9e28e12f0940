"""Kernels that are launched while the one before still runs (CUDA programming guide, "programmatic
dependent launch").

A step is two or three short kernels, and between each pair the GPU would be idle for a
microsecond or two. From Hopper on a kernel's blocks may take their places as soon as all of the
kernel before have theirs; they then wait until it has ended and what it wrote can be seen. All
kernels here let the next one begin so, and wait before anything else.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx, transform
from tvm.script import tirx as T

OVERLAPPED = "tirx.use_programtic_dependent_launch"
"""TVM's name (and spelling) of the tag among a kernel's launch parameters."""
LAUNCH_PARAMETERS = "tirx.kernel_launch_params"
FIRST_MAJOR = 9

SUCCEED = """
__device__ __forceinline__ void deft_succeed() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
"""


def can_overlap(arch: str) -> bool:
    """Whether GPUs of ``sm_90a`` and the like can."""
    return int(arch.removeprefix("sm_").rstrip("af")) // 10 >= FIRST_MAJOR


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.OverlapLaunches")
def overlap_launches(
    func: tirx.PrimFunc, _module: Any, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Let a function of the device be launched early, where it can be, and wait first."""
    tags = (func.attrs or {}).get(LAUNCH_PARAMETERS)
    if tags is None or not can_overlap(str(func.attrs["target"].attrs["arch"])):
        return func
    wait = tirx.Evaluate(T.cuda.func_call("deft_succeed", source_code=SUCCEED))
    begun = func.with_body(tirx.SeqStmt([wait, func.body]))
    # The tag of shared memory is the last one.
    return begun.with_attr(LAUNCH_PARAMETERS, [OVERLAPPED, *tags])

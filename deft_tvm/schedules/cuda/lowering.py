"""From scheduled kernels to CUDA.

TVM lets a compilation name its lowering pipeline. Ours is TVM's for scheduled TensorIR, without the
steps that only other targets or features need, and with our own between: what copies, staging,
shares of warps and launches after one another ask for that no scheduling primitive can say.
"""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import DataType, IRModule, s_tir, tirx, transform
from tvm import compile as tvm_compile
from tvm.target import Target
from tvm.tirx.compilation_pipeline import (
    finalize_device_passes,
    finalize_host_passes,
    register_tir_pipeline,
)

from deft_tvm.device import LEAST_SHARED_BYTES, cuda_target
from deft_tvm.errors import PlanError
from deft_tvm.kernels.work import OF_PLAN
from deft_tvm.schedules.cuda.allocations import lift_registers
from deft_tvm.schedules.cuda.copies import copy_whole_vectors
from deft_tvm.schedules.cuda.limits import BLOCKS
from deft_tvm.schedules.cuda.lookups import look_up_first
from deft_tvm.schedules.cuda.repeats import repeat_iterations
from deft_tvm.schedules.cuda.rows import ask_once_a_row
from deft_tvm.schedules.cuda.shares import (
    DEALT,
    DEALT_FOURS,
    DEALT_ROWS,
    DEALT_THREADS,
    FRAGMENT,
    QUAD_ROWS,
    keep_own_share,
)
from deft_tvm.schedules.cuda.staging import fetch_tiles_ahead
from deft_tvm.schedules.cuda.statements import substitute
from deft_tvm.schedules.cuda.succession import overlap_launches
from deft_tvm.schedules.passes import tidy

PIPELINE = "deft_tvm_cuda"


def compile_cuda(module: IRModule, arch: str) -> Any:
    """Compile scheduled kernels for one GPU architecture.

    Args:
        module: the scheduled functions.
        arch: as nvcc names it, ``sm_90a``.

    Returns:
        A TVM executable whose first imported module holds the kernels: CUDA source where this
        machine has no GPU, a cubin where it has one.

    Raises:
        PlanError: a kernel's tiles take more shared memory than a block of `arch` has.
    """
    register_tir_pipeline(PIPELINE, _pipeline)
    return tvm_compile(module, target=_target(arch), tir_pipeline=PIPELINE)


def _target(arch: str) -> Target:
    return Target(cuda_target(arch), host="llvm")


def cuda_source(executable: Any) -> str:
    """The CUDA C++ text of what `compile_cuda` returned."""
    return str(executable.mod.imports[0].inspect_source())


def shared_bytes(module: IRModule, arch: str) -> int:
    """Shared memory that one block of the module's hungriest kernel takes, static and dynamic."""
    bound = tirx.transform.BindTarget(_target(arch))(module)
    kernels = transform.Sequential(_threaded())(bound).functions.values()
    return max(_shared_bytes(kernel.body) for kernel in kernels)


def _shared_bytes(body: tirx.Stmt) -> int:
    return sum(size for _, size in _shared_sizes(body))


def _shared_sizes(body: tirx.Stmt) -> list[tuple[Any, int]]:
    """The buffers in shared memory, and the bytes of each."""
    sizes: list[tuple[Any, int]] = []

    def look(allocation: Any) -> None:
        buffer = allocation.buffer
        if buffer.scope().startswith("shared"):
            elements = math.prod(int(extent) for extent in buffer.ty.shape)
            sizes.append((buffer, elements * DataType(str(buffer.ty.dtype)).itemsize))

    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, look)])
    return sizes


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.CheckSharedMemory")
def _check_shared_memory(
    func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Refuse here what a GPU would refuse at launch."""
    target = func.attrs["target"].attrs
    used, limit = _shared_bytes(func.body), int(target["max_shared_memory_per_block"])
    if used > limit:
        raise PlanError(
            f"{func.attrs['global_symbol']} takes {used} bytes of shared memory; expected at most "
            f"{limit} on {target['arch']}: give its tile class a smaller kv_tile or lane_rows"
        )
    return func


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.AskForSharedMemory")
def _ask_for_shared_memory(
    func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Let dynamic shared memory alone be more than what every kernel may have, if all of it is.

    TVM asks CUDA for more by the dynamic part alone: with a static one beside, a kernel may need
    more without a word, and is not launched (``CUDA_ERROR_INVALID_VALUE``; H200, 2026-11-27).
    """
    sizes = _shared_sizes(func.body)
    dynamic = sum(size for buffer, size in sizes if buffer.scope() == "shared.dyn")
    total = sum(size for _, size in sizes)
    if not dynamic or not dynamic <= LEAST_SHARED_BYTES < total:
        return func
    (old,) = (buffer for buffer, _ in sizes if buffer.scope() == "shared.dyn")
    element = DataType(str(old.ty.dtype)).itemsize
    wide = tirx.decl_buffer(
        [LEAST_SHARED_BYTES // element + 16], old.ty.dtype, old.name, scope="shared.dyn"
    )
    return func.with_body(substitute(func.body, old, wide))


class _Noted:
    """How many blocks of each kernel a multiprocessor shall have registers for, and which kernels
    bind only what is of the plan before they wait.

    Schedules and computations say so in ways of which nothing is left when a kernel has become a
    function of the device: so it is noted by name in between.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, int] = {}
        self.of_plan: set[str] = set()

    def note(self) -> transform.Pass:
        """The pass that reads what they say."""

        @tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.Note")
        def note(
            func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
        ) -> tirx.PrimFunc:
            name = str(func.attrs["global_symbol"])
            if func.attrs.get(OF_PLAN, False):
                self.of_plan.add(name)

            def look(loop: tirx.For) -> None:
                if BLOCKS in loop.annotations:
                    self.blocks[name] = int(loop.annotations[BLOCKS])

            tvm_ffi.structural_walk(func.body, [(tirx.For, look)])
            return func

        return note

    def bound(self) -> transform.Pass:
        """The pass that tells ptxas; without a word it spills a little to make room for more."""

        @tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.BoundRegisters")
        def bound(
            func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
        ) -> tirx.PrimFunc:
            name = str(func.attrs["global_symbol"]).removesuffix("_kernel")
            return func.with_attr("tirx.launch_bounds_min_blocks_per_sm", self.blocks.get(name, 1))

        return bound


def _threaded() -> list[transform.Pass]:
    """TVM's lowering down to one thread's code over flat buffers, with our passes between."""
    lower, simplify = s_tir.transform, tirx.transform.StmtSimplify
    return [
        repeat_iterations,
        keep_own_share(DEALT, DEALT_FOURS, DEALT_ROWS, DEALT_THREADS, QUAD_ROWS),
        lower.CanonicalizeLoop(),
        lower.LowerCrossThreadReduction(),
        lower.LowerInitBlock(),
        lower.PlanAndUpdateBufferAllocationLocation(),
        lower.ConvertBlocksToOpaque(),
        lower.LiftThreadBinding(),
        lower.CompactBufferAllocation(),
        lower.UnifyThreadBinding(),
        lower.LowerMatchBuffer(),
        fetch_tiles_ahead,
        copy_whole_vectors,
        look_up_first,
        keep_own_share(FRAGMENT),
        lift_registers,
        simplify(),
        ask_once_a_row,
        lower.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        lower.LoopPartition(),
        tirx.transform.VectorizeLoop(),
        *tidy(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        lower.ThreadSync("shared"),
        lower.ThreadSync("shared.dyn"),
        lower.LowerThreadAllreduce(),
        lower.MergeSharedMemoryAllocations(),
    ]


def _pipeline() -> tuple[transform.Pass, Any, Any]:
    """The three parts of a lowering pipeline, as TVM asks for them."""
    noted = _Noted()
    passes = [
        noted.note(),
        *_threaded(),
        _check_shared_memory,
        _ask_for_shared_memory,
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]

    def finalize_device() -> transform.Pass:
        ours = [noted.bound(), overlap_launches(noted.of_plan)]
        return transform.Sequential([*ours, finalize_device_passes()])

    return transform.Sequential(passes), finalize_host_passes, finalize_device

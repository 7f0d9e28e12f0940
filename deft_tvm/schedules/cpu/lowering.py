"""From scheduled kernels to machine code of a CPU.

TVM lets a compilation name its lowering pipeline. Ours is TVM's for scheduled TensorIR, without the
steps that only other targets or features need, and with our own between: loops over lane rows end
where the item's rows do, and stages write over what they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm_ffi
from tvm import IRModule, s_tir, tirx, transform
from tvm import compile as tvm_compile
from tvm.runtime import Executable
from tvm.target import Target
from tvm.tirx import Var
from tvm.tirx.buffer import is_buffer_var
from tvm.tirx.compilation_pipeline import (
    finalize_device_passes,
    finalize_host_passes,
    register_tir_pipeline,
)

from deft_tvm.schedules.cpu.in_place import write_in_place
from deft_tvm.schedules.cpu.trimmed import trim_rows
from deft_tvm.schedules.cpu.vector import REGISTERS
from deft_tvm.schedules.passes import tidy

PIPELINE = "deft_tvm_cpu"


def compile_cpu(module: IRModule, target: Mapping[str, object]) -> Executable:
    """Compile scheduled kernels for a target as `DeviceProfile.target` gives it."""
    register_tir_pipeline(PIPELINE, _pipeline)
    return tvm_compile(module, target=Target(dict(target)), tir_pipeline=PIPELINE)


def _pipeline() -> tuple[transform.Pass, Any, Any]:
    """The three parts of a lowering pipeline, as TVM asks for them."""
    lower, simplify = s_tir.transform, tirx.transform.StmtSimplify
    passes = [
        lower.CanonicalizeLoop(),
        lower.LowerInitBlock(),
        lower.PlanAndUpdateBufferAllocationLocation(),
        lower.ConvertBlocksToOpaque(),
        lower.CompactBufferAllocation(),
        lower.LowerMatchBuffer(),
        trim_rows,
        simplify(),
        lower.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        write_in_place,
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        lower.LoopPartition(),
        tirx.transform.VectorizeLoop(),
        tirx.transform.StorageRewrite(),
        settle_registers,
        *tidy(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]
    return transform.Sequential(passes), finalize_host_passes, finalize_device_passes


@tirx.transform.prim_func_pass(opt_level=0, name="deft_tvm.SettleRegisters")
def settle_registers(
    func: tirx.PrimFunc, _module: IRModule, _context: transform.PassContext
) -> tirx.PrimFunc:
    """Give tiles of scope `REGISTERS` the scope that TVM puts on the stack, if they are small."""
    settled: dict[Any, Any] = {}

    def settle(var: Any) -> Any:
        if not is_buffer_var(var) or var.scope() != REGISTERS:
            return var
        if var not in settled:
            settled[var] = tirx.decl_buffer(var.ty.shape, var.ty.dtype, var.name)
        return settled[var]

    return func.with_body(tvm_ffi.structural_map(func.body, [(Var, settle)], order="post"))

"""Generated CUDA through nvcc: no stack, no spills, registers and shared memory within limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from tvm import IRModule

from deft_tvm.schedules import KernelTask, schedule
from deft_tvm.schedules.cuda.limits import shared_limit
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source, shared_bytes
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")

MOST_REGISTERS = 255
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
# As TVM calls nvcc and ptxas itself.
PTXAS = "-Xptxas=-v,--register-usage-level=10,-warn-spills,-warn-lmem-usage"
USAGE = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)

SPECS = ("gqa:hq=32,hkv=8,d=128,dtype=f16", "gqa:hq=32,hkv=8,d=128,dtype=f32")
# These take the schedules of the two above with other loads: the architecture with the least shared
# memory tells enough, as each compilation takes many seconds.
FEW_ARCHS = ("sm_89",)
VARIANTS = (
    "gqa:hq=32,hkv=8,d=128,dtype=bf16",
    "gqa:hq=32,hkv=8,d=256,dtype=bf16",
    "gqa:hq=32,hkv=8,d=128,dtype=bf16,layout=hnd",
    "kv:hq=32,hkv=8,buffers=state*8*128*bf16+rope*1*64*bf16,k=0*0*128,v=0*0*128,rope=1,"
    "scale=0.125,dtype=bf16",
    "gqa:hq=32,hkv=8,d=128,kv_dtype=e4m3,dtype=bf16,sinks=yes",
    "mla:hq=16,d=128,kv_dtype=e4m3,rope=64,dtype=bf16,page=64,scale=0.1",
)


@pytest.mark.parametrize(("text", "arch"), [*product(SPECS, ARCHS), *product(VARIANTS, FEW_ARCHS)])
def test_kernels_fit_the_machine(text: str, arch: str, tmp_path: Path) -> None:
    """All kernels of a spec, in one module as they ship."""
    spec = AttentionSpec.parse(text)
    module = IRModule()
    for tile in (*default_tiles(spec, "cuda", frozenset()), None):
        kernel = schedule(task_of(spec, tile, arch))[0].mod
        assert shared_bytes(kernel, arch) <= shared_limit(arch), tile
        module.update(kernel)
    report = ptxas_report(cuda_source(compile_cuda(module, arch)), arch, tmp_path)
    kernels = USAGE.findall(report)
    assert len(kernels) == len(module.functions), report
    for stack, spill_stores, spill_loads, registers in kernels:
        assert (stack, spill_stores, spill_loads) == ("0", "0", "0"), report
        assert int(registers) <= MOST_REGISTERS, report


def task_of(spec: AttentionSpec, tile: TileShape | None, arch: str) -> KernelTask:
    target = {"kind": "cuda", "arch": arch}
    if tile is None:
        return KernelTask("merge", spec, None, target, frozenset(), "merge")
    return KernelTask("partial", spec, tile, target, frozenset(), f"partial_{tile.name}")


def ptxas_report(source: str, arch: str, folder: Path) -> str:
    text = folder / "kernels.cu"
    text.write_text(source)
    done = subprocess.run(
        [
            "nvcc",
            "-cubin",
            "-O3",
            "--use_fast_math",
            f"-arch={arch}",
            PTXAS,
            text,
            "-o",
            folder / "kernels.cubin",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr

"""Generated CUDA through nvcc: no stack, no spills, registers and shared memory within limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from deft_tvm.schedules import KernelTask, schedule
from deft_tvm.schedules.cuda.limits import shared_limit
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source, shared_bytes
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
# As TVM calls ptxas itself.
PTXAS = "-Xptxas=-v,--register-usage-level=10,-warn-spills,-warn-lmem-usage"
USAGE = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


@dataclass(frozen=True)
class Usage:
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


def usage(task: KernelTask, arch: str, folder: Path) -> Usage:
    source = folder / "kernel.cu"
    source.write_text(cuda_source(compile_cuda(schedule(task)[0].mod, arch)))
    done = subprocess.run(
        ["nvcc", "-cubin", "-O3", f"-arch={arch}", PTXAS, source, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = USAGE.search(done.stderr)
    assert found is not None, done.stderr
    return Usage(*map(int, found.groups()))


def task_of(spec: AttentionSpec, tile: TileShape | None, arch: str) -> KernelTask:
    target = {"kind": "cuda", "arch": arch}
    kernel = "merge" if tile is None else "partial"
    return KernelTask(kernel, spec, tile, target, frozenset(), kernel)


SPECS = ("gqa:hq=32,hkv=8,d=128,dtype=f16", "gqa:hq=32,hkv=8,d=128,dtype=f32")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("text", SPECS)
def test_kernels_fit_the_machine(text: str, arch: str, tmp_path: Path) -> None:
    spec = AttentionSpec.parse(text)
    for tile in (*default_tiles(spec, "cuda", frozenset()), None):
        task = task_of(spec, tile, arch)
        used = usage(task, arch, tmp_path)
        assert (used.stack, used.spill_stores, used.spill_loads) == (0, 0, 0), (tile, used)
        assert used.registers <= 255
        assert shared_bytes(schedule(task)[0].mod, arch) <= shared_limit(arch)

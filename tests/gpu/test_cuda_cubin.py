"""Generated CUDA through nvcc: it fits the machine, and is made of the instructions it is for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from cubins import Cubin, compiled, disassembler
from tvm import IRModule

from deft_tvm.device import shared_limit
from deft_tvm.schedules import KernelTask, MergeTask, PartialTask, schedule
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source, shared_bytes
from deft_tvm.schedules.cuda.succession import can_overlap
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is missing: cubins are not compiled"
)

REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
MOST_SPILLED = 32
"""Bytes that a thread may store and load: a few scalars of the whole kernel, nothing of a tile."""
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\((\d+), (\d+)\) (\w+)_kernel\(")

GQA = "gqa:hq=32,hkv=8,d=128,dtype=bf16"
LATENT = "rope=64,dtype=bf16,page=64,scale=0.07216878364870322"
CASES = (
    *product([GQA], ARCHS),
    ("gqa:hq=32,hkv=8,d=128,dtype=f16", "sm_90a"),
    *product(["gqa:hq=32,hkv=8,d=128,dtype=f32"], ("sm_80", "sm_90a")),
    ("gqa:hq=32,hkv=32,d=128,dtype=bf16", "sm_90a"),
    # The same with other loads and widths: the architecture with the least shared memory tells.
    ("gqa:hq=32,hkv=8,d=256,dtype=bf16", "sm_89"),
    ("gqa:hq=32,hkv=8,d=128,dtype=bf16,layout=hnd", "sm_89"),
    ("gqa:hq=32,hkv=8,d=128,kv_dtype=e4m3,dtype=bf16,sinks=yes", "sm_89"),
    ("gta:hq=32,hkv=8,d=128,rope=64,dtype=bf16", "sm_89"),
    ("mla:hq=16,d=128,kv_dtype=e4m3,rope=64,dtype=bf16,page=64,scale=0.1", "sm_89"),
    (f"mla:hq=128,d=512,{LATENT}", "sm_90a"),
    (f"mla:hq=16,d=512,{LATENT}", "sm_90a"),
    (f"gla:hq=128,hkv=2,d=256,{LATENT}", "sm_90a"),
)


@dataclass(frozen=True)
class Compiled:
    """All kernels of a spec, in one module as they ship.

    Attributes:
        tasks: by symbol.
        taken: what each one's schedule decided.
        shared: bytes of shared memory that a block of each takes.
        source: their CUDA.
        cubin: what nvcc made of it.
    """

    tasks: dict[str, KernelTask]
    taken: dict[str, dict[str, int]]
    shared: dict[str, int]
    source: str
    cubin: Cubin

    @property
    def partial(self) -> dict[str, PartialTask]:
        return {n: task for n, task in self.tasks.items() if isinstance(task, PartialTask)}

    def in_groups(self, name: str) -> bool:
        """Whether the kernel's warps multiply in groups of four."""
        return bool(self.taken[name].get("groups", 0))

    def in_warps(self, name: str) -> bool:
        """Whether each of its warps multiplies by itself, on tensor cores."""
        return _on_tensor_cores(self.tasks[name]) and not self.in_groups(name)

    def copies_ahead(self, name: str) -> bool:
        return self.taken[name]["stages"] > 1


@pytest.fixture
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The module of a case, compiled once in all processes of a test run."""
    base, run = tmp_path_factory.getbasetemp(), os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return _compiled(*request.param, base if run is None else base.parent / f"cubins-{run}")


@cache
def _compiled(text: str, arch: str, folder: Path) -> Compiled:
    spec, target = AttentionSpec.parse(text), {"kind": "cuda", "arch": arch}
    tiles = default_tiles(spec, "cuda", frozenset({arch}))
    partials = [PartialTask(spec, target, frozenset(), tile) for tile in tiles]
    tasks = {task.symbol: task for task in (*partials, MergeTask(spec, target, frozenset()))}
    taken, shared, kernels = {}, {}, IRModule()
    for symbol, task in tasks.items():
        scheduled, knobs = schedule(task)
        taken[symbol] = knobs.taken
        shared[symbol] = shared_bytes(scheduled.mod, arch)
        kernels.update(scheduled.mod)
    source = cuda_source(compile_cuda(kernels, arch))
    return Compiled(tasks, taken, shared, source, compiled(source, arch, folder))


each_case = pytest.mark.parametrize("module", CASES, indirect=True, ids=" ".join)


@each_case
def test_kernels_fit_the_machine(module: Compiled) -> None:
    assert module.cubin.usage.keys() == module.tasks.keys()
    bounds = {name: (int(t), int(b)) for t, b, name in LAUNCH_BOUNDS.findall(module.source)}
    for name, usage in module.cubin.usage.items():
        threads, blocks = bounds[name]
        arch = str(module.tasks[name].target["arch"])
        assert usage.registers <= MOST_REGISTERS, (name, usage)
        assert _allocated(usage.registers) * threads * blocks <= REGISTERS, (name, usage)
        assert module.shared[name] <= shared_limit(arch), name


@each_case
def test_nothing_of_a_tile_is_in_local_memory(module: Compiled) -> None:
    for name, usage in module.cubin.usage.items():
        if usage.spilled > MOST_SPILLED and _fills_the_registers(module.tasks[name]):
            pytest.xfail(
                f"{name} spills {usage.spilled} bytes: its output alone fills the registers"
            )
        assert usage.spilled <= MOST_SPILLED, (name, usage)
        # An array that is indexed by what is known at run time would be on the stack as well.
        assert usage.stack <= usage.spilled, (name, usage)


@each_case
def test_kernels_are_made_of_the_instructions_they_are_for(module: Compiled) -> None:
    if disassembler() is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    for name in module.partial:
        found = module.cubin.instructions[name]
        groups, warps = module.in_groups(name), module.in_warps(name)
        assert _any(found, "HGMMA.64x") == groups, name
        assert _any(found, "HMMA.16816.F32") == warps, name
        assert _any(found, "LDSM.16") == warps, name
        asynchronous = module.copies_ahead(name)
        assert _any(found, "LDGSTS") == asynchronous, name
        wide = "LDGSTS.E.BYPASS.128" if asynchronous else "LDG.E.128"
        assert _any(found, wide), name
        # A division of integers goes through a reciprocal, rounded up.
        assert not _any(found, "I2F.U32.RP"), name


@each_case
def test_ptx_has_them_too(module: Compiled) -> None:
    """What is left to look at where nvdisasm is missing."""
    for name in module.partial:
        text = module.cubin.ptx[name]
        groups, warps = module.in_groups(name), module.in_warps(name)
        assert ("wgmma.mma_async.sync.aligned.m64" in text) == groups, name
        assert ("mma.sync.aligned.m16n8k16" in text) == warps, name
        assert ("ldmatrix.sync.aligned.m8n8.x4" in text) == warps, name
        asynchronous = module.copies_ahead(name)
        assert ("cp.async.cg.shared.global" in text) == asynchronous, name
        assert "ld.global.nc.v4" in text or "ld.global.v4" in text or asynchronous, name
        assert not re.search(r"\b(div|rem)\.[us](32|64)", text), name


@each_case
def test_kernels_wait_for_the_one_before(module: Compiled) -> None:
    """Before they read anything; the merge before it reads more than its place in the plan."""
    if disassembler() is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    for name, task in module.tasks.items():
        found = list(module.cubin.instructions[name])  # each by its first place
        assert ("ACQBULK" in found) == can_overlap(str(task.target["arch"])), name
        if "ACQBULK" not in found:
            continue
        before = found[: found.index("ACQBULK")]
        assert "PREEXIT" not in before, name
        plain = {"LDG.E"} if name == "merge" else set()
        read = {one for one in before if one.startswith(("LDG", "LDS", "ST"))}
        assert read == plain, name
        # What others write while a kernel waits must not come out of a cache that takes it for
        # what never changes.
        assert name != "merge" or not any("CONSTANT" in one for one in found)


def _fills_the_registers(task: KernelTask) -> bool:
    """Whether the accumulators of one tile are as many as a multiprocessor has registers."""
    partial = isinstance(task, PartialTask)
    return partial and task.tile.lane_rows * task.spec.v_width >= REGISTERS


def _on_tensor_cores(task: KernelTask) -> bool:
    return isinstance(task, PartialTask) and task.tile.operand != "float32"


def _allocated(registers: int) -> int:
    """Registers of a thread as they are dealt out: 256 of a warp at a time."""
    return -(-registers // 8) * 8


def _any(found: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in found)

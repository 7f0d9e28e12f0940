"""Schedules for AMX, where the processor has none: its instructions done by functions in C.

The functions are called in place of the instructions and do what Intel's manual says, refusals
included; all else is the code that a machine with AMX runs. Such a machine runs the same schedules
natively in every other test of kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from compiled import Compiled, scheduled, tasks_with, worst
from tvm.runtime import load_module

from deft_tvm.build import compile_module
from deft_tvm.device import DeviceProfile
from deft_tvm.native import TORCH_POOL, compile_c
from deft_tvm.schedules import KernelTask, schedule, tiles_of
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.workloads import parse, tensors

HERE = DeviceProfile.detect()
FORESTS = ("few_shot:prompt=300,branches=12,tokens=20", "speculative:nodes=26,context=90")

needs_bfloat16 = pytest.mark.skipif(
    "avx512bf16" not in HERE.features, reason="this machine has no AVX512-BF16"
)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on PATH")

SPECS = {
    "gqa": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16"),
    "mqa-hnd": AttentionSpec.gqa(
        num_q_heads=16, num_kv_heads=1, head_dim=96, dtype="bfloat16", layout="HND"
    ),
    "tied-rope": AttentionSpec(
        num_q_heads=8,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 80, "bfloat16"), CacheBuffer("rope", 1, 32, "bfloat16")),
        k=Region(0, 16, 80),
        v=Region(0, 0, 80),
        rope=1,
        scale=0.125,
        dtype="bfloat16",
    ),
}


class Emulated(Compiled):
    """Kernels whose tile instructions are calls of C functions."""

    def __init__(self, tasks: tuple[KernelTask, ...], decisions: list[dict[str, int]], path: Path):
        self.tiles = tiles_of(tasks)
        executable = compile_module(scheduled(tasks, decisions), HERE.target())
        emulation = str(path / "amx.o")
        source = str(Path(__file__).with_name("amx.c"))
        subprocess.run(["gcc", "-O2", "-fPIC", "-c", source, "-o", emulation], check=True)
        library = str(path / "module.so")
        executable.export_library(library, addons=[emulation, *compile_c(TORCH_POOL, path)])
        self.executable = load_module(library)
        self.functions = [self.executable[task.symbol] for task in tasks]


@pytest.fixture
def emulated_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = import_module("deft_tvm.schedules.cpu.rows_in_tiles")
    instructions = r"@llvm\.x86\.((?:ld|st)?tile\w+|tdpbf16ps)"
    calls, replaced = re.subn(instructions, r"@emulated_\1", schedules.AMX_LLVM)
    assert replaced > 20
    monkeypatch.setattr(schedules, "AMX_LLVM", calls.replace(" immarg", ""))


def tasks_with_amx(spec: AttentionSpec, tiles: list[TileShape]) -> tuple[KernelTask, ...]:
    return tasks_with((*HERE.features, "amx-tile", "amx-bf16"), spec, tiles)


@needs_bfloat16
@needs_gcc
@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize(("lane_rows", "kv_tile"), [(16, 64), (32, 32), (128, 64)])
def test_products_in_tiles_are_right(
    emulated_amx: None, tmp_path: Path, spec_name: str, lane_rows: int, kv_tile: int
) -> None:
    spec = SPECS[spec_name]
    tasks = tasks_with_amx(spec, [TileShape(lane_rows, kv_tile, "bfloat16")])
    by_default, knobs = schedule(tasks[0])
    assert "deft_tile_products" in str(by_default.mod)
    smallest = {choice: min(candidates) for choice, candidates in knobs.table.items()}
    for name, decision in (("default", {}), ("smallest", smallest)):
        (folder := tmp_path / name).mkdir()  # the linker knows a library by its name
        kernels = Emulated(tasks, [decision, {}], folder)
        for forest in FORESTS:
            assert worst(kernels, tensors(parse(forest).forest, spec)) <= 1, (forest, decision)


@needs_bfloat16
def test_widths_that_are_no_whole_tiles_stay_with_vectors() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=80, dtype="bfloat16")
    task = tasks_with_amx(spec, [TileShape(32, 64, "bfloat16")])[0]
    assert "deft_tile" not in str(schedule(task)[0].mod)

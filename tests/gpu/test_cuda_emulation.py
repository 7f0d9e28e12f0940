"""Generated CUDA, run on the CPU one thread for each CUDA thread, against the oracle."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tvm
from emulate import FLAGS
from problems import (
    BRANCHES,
    CAUSAL,
    DRAFT,
    EMPTY,
    LONG,
    Problem,
    check,
    make_problem,
    partial_task,
    run,
)

from deft_tvm.errors import PlanError
from deft_tvm.schedules import apply_rules, schedule
from deft_tvm.schedules.cuda.copies import _device_function
from deft_tvm.schedules.cuda.lowering import compile_cuda
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


def gqa(heads: int, kv_heads: int, width: int, dtype: str, **others: object) -> AttentionSpec:
    return AttentionSpec.gqa(
        num_q_heads=heads, num_kv_heads=kv_heads, head_dim=width, dtype=dtype, **others
    )


def tied(dtype: str) -> AttentionSpec:
    """A state 64 wide that is both K and V, with 16 columns of rope under one head."""
    return AttentionSpec(
        num_q_heads=4,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 64, dtype), CacheBuffer("rope", 1, 16, dtype)),
        k=Region(0, 0, 64),
        v=Region(0, 0, 64),
        rope=1,
        scale=0.11,
        dtype=dtype,
        page_size=8,
    )


def latent(dtype: str, width: int, rope: int) -> AttentionSpec:
    """A latent that is both K and V, with a rope beside it, as in MLA."""
    return AttentionSpec.mla(
        num_q_heads=16,
        kv_lora_rank=width,
        qk_rope_head_dim=rope,
        scale=0.07,
        dtype=dtype,
        page_size=8,
    )


def part_of_a_state() -> AttentionSpec:
    """A state 128 wide whose second half is K, all of it V."""
    return AttentionSpec(
        num_q_heads=4,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 128, "bfloat16"),),
        k=Region(0, 64, 128),
        v=Region(0, 0, 128),
        scale=0.11,
        dtype="bfloat16",
        page_size=8,
    )


CASES = {
    "scalar, decode tile": (gqa(8, 2, 64, "float32"), (4, 64, "float32"), BRANCHES, "node"),
    "scalar, half cache, 128 wide": (
        gqa(4, 1, 128, "float16"),
        (4, 64, "float32"),
        BRANCHES,
        "packed",
    ),
    "scalar, odd sizes": (
        gqa(3, 1, 80, "bfloat16", layout="HND", page_size=4),
        (6, 24, "float32"),
        BRANCHES,
        "packed",
    ),
    "scalar, tied and rope": (tied("float32"), (16, 32, "float32"), DRAFT, "packed"),
    "tensor cores, half": (gqa(8, 2, 64, "float16"), (32, 64, "float16"), BRANCHES, "packed"),
    "tensor cores, bfloat16, pages of one": (
        gqa(4, 2, 128, "bfloat16", page_size=1),
        (16, 32, "bfloat16"),
        DRAFT,
        "node",
    ),
    "tensor cores, tied and rope": (tied("float16"), (16, 16, "float16"), BRANCHES, "flatten"),
    "tensor cores, causal": (
        gqa(2, 2, 80, "bfloat16", layout="HND"),
        (64, 16, "bfloat16"),
        CAUSAL,
        "node",
    ),
    "scalar, window": (
        gqa(8, 2, 64, "float32", window=9, page_size=8),
        (8, 32, "float32"),
        BRANCHES,
        "packed",
    ),
    "tensor cores, window and cap": (
        gqa(8, 2, 64, "float16", window=20, soft_cap=4.0),
        (32, 32, "float16"),
        BRANCHES,
        "flatten",
    ),
    "scalar, 8 bits": (
        gqa(8, 2, 64, "float32", kv_dtype="float8_e4m3fn"),
        (8, 32, "float32"),
        BRANCHES,
        "packed",
    ),
    "tensor cores, 8 bits and sinks": (
        gqa(8, 2, 64, "bfloat16", kv_dtype="float8_e4m3fn", sinks=True),
        (32, 32, "bfloat16"),
        BRANCHES,
        "node",
    ),
    "scalar, sinks, a row alone and rows that see nothing": (
        gqa(4, 2, 64, "float32", sinks=True),
        (4, 16, "float32"),
        EMPTY,
        "node",
    ),
    "scalar, long": (gqa(4, 2, 64, "float32"), (4, 16, "float32"), LONG, "flatten"),
    "tensor cores, long": (gqa(4, 1, 64, "bfloat16"), (16, 32, "bfloat16"), LONG, "node"),
    "tensor cores, long window": (
        gqa(4, 1, 64, "float16", window=300),
        (32, 16, "float16"),
        LONG,
        "packed",
    ),
    "empty": (gqa(4, 2, 64, "float16"), (16, 16, "float16"), EMPTY, "node"),
    "groups, half": (gqa(8, 2, 64, "float16"), (64, 64, "float16"), BRANCHES, "packed"),
    "groups, two panels, two groups": (
        gqa(4, 1, 128, "bfloat16", page_size=1),
        (128, 32, "bfloat16"),
        DRAFT,
        "node",
    ),
    "groups, causal": (
        gqa(2, 2, 64, "bfloat16", layout="HND"),
        (64, 16, "bfloat16"),
        CAUSAL,
        "node",
    ),
    "groups, tied and rope": (
        latent("float16", 256, 64),
        (64, 32, "float16"),
        BRANCHES,
        "flatten",
    ),
    "groups, half of the columns each": (
        latent("bfloat16", 512, 64),
        (64, 32, "bfloat16"),
        BRANCHES,
        "packed",
    ),
    "groups, part of a state": (part_of_a_state(), (64, 16, "bfloat16"), BRANCHES, "node"),
    "groups, long window, cap and sinks": (
        gqa(4, 1, 64, "float16", window=300, soft_cap=4.0, sinks=True),
        (64, 32, "float16"),
        LONG,
        "packed",
    ),
    "groups, empty": (gqa(4, 2, 64, "float16"), (64, 64, "float16"), EMPTY, "node"),
}


def problem_of(case: str) -> Problem:
    spec, tile, forest, grouping = CASES[case]
    return make_problem(spec, forest, (TileShape(*tile),), grouping)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(case: str, tmp_path: Path) -> None:
    problem = problem_of(case)
    run(problem, tmp_path)
    check(problem)


@pytest.mark.parametrize(
    ("kv_dtype", "lane_rows"),
    [("float32", 16), ("float16", 16), ("float8_e4m3fn", 16), ("float16", 64)],
)
def test_reads_caches_of_odd_strides(kv_dtype: str, lane_rows: int, tmp_path: Path) -> None:
    """Rows that no 16-byte load can reach are read element by element."""
    operand = "bfloat16" if kv_dtype == "float8_e4m3fn" else kv_dtype
    spec = gqa(4, 2, 64, operand, kv_dtype=kv_dtype)
    problem = make_problem(spec, BRANCHES, (TileShape(lane_rows, 32, operand),), "packed")
    shifted = []
    for cache in problem.case.buffers:
        wide = torch.full((*cache.shape[:-1], 67), torch.nan).to(cache.dtype)
        wide[..., 1:65] = cache
        shifted.append(wide[..., 1:65])
    problem = replace(problem, case=replace(problem.case, buffers=tuple(shifted)))
    run(problem, tmp_path)
    check(problem)


DECODE_MAIN = """
#include <cstdio>
#include <xmmintrin.h>
int main() {
  _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormal float32 are 0, as with --use_fast_math
  for (int first = 0; first < 256; first += 16) {
    alignas(16) unsigned char bytes[16];
    float values[16];
    for (int i = 0; i < 16; ++i) bytes[i] = first + i;
    FUNCTION(values, bytes);
    for (float value : values) std::printf("%a\\n", value);
  }
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flushes subnormals by x86's register")
def test_8_bit_elements_are_decoded_without_subnormal_floats(tmp_path: Path) -> None:
    name, text = _device_function("uint8", "float32", later=False)
    source = tmp_path / "decode.cpp"
    source.write_text(f'#include "emulate.h"\n{text}\n' + DECODE_MAIN.replace("FUNCTION", name))
    subprocess.run(["g++", *FLAGS, source, "-o", tmp_path / "decode"], check=True)
    printed = subprocess.run([tmp_path / "decode"], capture_output=True, text=True, check=True)
    found = torch.tensor(
        [math.nan if "nan" in line else float.fromhex(line) for line in printed.stdout.split()]
    )
    wanted = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operand", ["float32", "float16"])
def test_scheduling_leaves_the_module_as_it_was(operand: str) -> None:
    task = partial_task(gqa(8, 2, 64, "float16"), TileShape(16, 64, operand))
    module = tvm.IRModule({task.symbol: task.computation})
    before = module.script()
    apply_rules(task, tvm.s_tir.Schedule(module), {})
    assert module.script() == before


def test_tiles_beyond_shared_memory_are_refused() -> None:
    task = partial_task(gqa(8, 2, 256, "float16"), TileShape(4, 64, "float32"))
    module = schedule(task)[0].mod
    with pytest.raises(PlanError, match=r"partial_r4t64f32 takes \d+ bytes of shared memory; ex"):
        compile_cuda(module, "sm_89")

"""Decisions all over the space of each CUDA schedule, in emulation against the oracle."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from problems import (
    ARCH,
    BRANCHES,
    CAUSAL,
    DRAFT,
    LONG,
    check,
    cuda_of,
    make_problem,
    merge_task,
    partial_task,
    run,
)

from deft_tvm.errors import PlanError
from deft_tvm.schedules import KernelTask, schedule
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")

SAMPLES = 2  # of each variant
TRIES = 20
FORESTS = {"branches": BRANCHES, "draft": DRAFT, "causal": CAUSAL, "long": LONG}
GROUPINGS = ("node", "packed", "flatten")

VARIANTS = {
    "GQA": "gqa:hq=8,hkv=2,d=64,dtype=bf16",
    "GQA, float32": "gqa:hq=8,hkv=2,d=64,dtype=f32",
    "MHA": "gqa:hq=2,hkv=2,d=64,dtype=f16",
    "MQA": "gqa:hq=16,hkv=1,d=128,dtype=bf16",
    "groups of 3, odd width": "gqa:hq=3,hkv=1,d=40,dtype=f16,page=4",
    "HND": "gqa:hq=4,hkv=2,d=80,dtype=bf16,layout=hnd",
    "window": "gqa:hq=4,hkv=2,d=64,dtype=f16,window=20",
    "soft cap": "gqa:hq=4,hkv=2,d=64,dtype=bf16,cap=4.0",
    "sinks": "gqa:hq=4,hkv=2,d=64,dtype=f16,sinks=yes,layout=hnd",
    "8 bits": "gqa:hq=4,hkv=2,d=64,kv_dtype=e4m3,dtype=bf16",
    "8 bits, window and sinks": "gqa:hq=4,hkv=2,d=64,kv_dtype=e4m3,dtype=f16,window=9,sinks=yes",
    "MLA": "mla:hq=16,d=128,rope=32,dtype=bf16,page=1,scale=0.1",
    "MLA, whole width": "mla:hq=16,d=512,rope=64,dtype=bf16,page=64,scale=0.07",
    "MLA, 8 bits": "mla:hq=16,d=128,kv_dtype=e4m3,rope=32,dtype=bf16,scale=0.1",
    "GLA": "gla:hq=8,hkv=2,d=64,rope=16,dtype=f16,scale=0.1",
    "GTA": "gta:hq=8,hkv=2,d=64,rope=32,dtype=bf16",
}


@pytest.mark.parametrize("sample", range(SAMPLES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_match_the_oracle(variant: str, sample: int, tmp_path: Path) -> None:
    rng = random.Random(f"{variant} {sample}")
    spec = AttentionSpec.parse(VARIANTS[variant])
    tile = rng.choice(tiles_of(spec))
    forest, grouping = rng.choice(list(FORESTS)), rng.choice(GROUPINGS)
    print(tile.name, forest, grouping)
    problem = make_problem(spec, FORESTS[forest], (tile,), grouping)
    run(problem, tmp_path, sampled_by(rng))
    check(problem)


def sampled_by(rng: random.Random) -> Callable[[KernelTask], str]:
    """CUDA source by random decisions, of those that fit in shared memory."""

    def source(task: KernelTask) -> str:
        table = schedule(task)[1].table
        for _ in range(TRIES):
            decision = {name: rng.choice(candidates) for name, candidates in table.items()}
            print(task.name, decision)
            try:
                return cuda_of(task, decision)
            except PlanError as refusal:
                print(refusal)
        raise AssertionError(f"none of {TRIES} decisions fits")

    return source


def tiles_of(spec: AttentionSpec) -> list[TileShape]:
    """The classes that ship, and others of both rules."""
    shipped = default_tiles(spec, "cuda", frozenset({ARCH}))
    rows = [rows for rows in (spec.group, 16, 32, 64) if rows >= spec.group]
    tokens = (16, 32) if spec.q_width + spec.v_width > 384 else (16, 32, 64)
    operand = shipped[-1].operand
    others = [TileShape(r, t, operand) for r in rows for t in tokens if r >= 16]
    scalar = [TileShape(r, t, "float32") for r in rows for t in tokens[:2] if r <= 16]
    return [*shipped, *others, *scalar]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_has_choices(variant: str) -> None:
    spec = AttentionSpec.parse(VARIANTS[variant])
    tiles = default_tiles(spec, "cuda", frozenset({ARCH}))
    for task in (*(partial_task(spec, tile) for tile in tiles), merge_task(spec)):
        _, knobs = schedule(task)
        assert any(len(candidates) > 1 for candidates in knobs.table.values()), task.name
        assert all(knobs.taken[name] in knobs.table[name] for name in knobs.table)

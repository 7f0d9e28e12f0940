"""CPU schedules: right by default and wherever the search may go, for every vector width."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import msgspec
import pytest
import tvm
from compiled import Compiled, scheduled, worst
from tvm import s_tir

from deft_tvm.build import compile_module, tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.dtypes import Dtype
from deft_tvm.errors import PlanError
from deft_tvm.schedules import KernelTask, PartialTask, apply_rules, schedule
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.workloads import parse, tensors

HERE = DeviceProfile.detect()
FORESTS = ("few_shot:prompt=300,branches=12,tokens=20", "speculative:nodes=26,context=90")
SAMPLES = 3  # of each of the four sampled cases: a dozen in all

SPECS = {
    "gqa": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64),
    "mha-bf16": AttentionSpec.gqa(num_q_heads=2, num_kv_heads=2, head_dim=96, dtype="bfloat16"),
    "mqa-bf16": AttentionSpec.gqa(num_q_heads=16, num_kv_heads=1, head_dim=64, dtype="bfloat16"),
    "group3-f16-hnd": AttentionSpec.gqa(
        num_q_heads=6, num_kv_heads=2, head_dim=80, dtype="float16", layout="HND", page_size=32
    ),
    "shared-state-bf16": AttentionSpec(
        num_q_heads=8,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 64, "bfloat16"), CacheBuffer("rope", 1, 16, "bfloat16")),
        k=Region(0, 0, 48),
        v=Region(0, 0, 64),
        rope=1,
        scale=0.125,
        dtype="bfloat16",
    ),
    "odd-width": AttentionSpec.gqa(num_q_heads=2, num_kv_heads=1, head_dim=23),
}


def compiled(tasks: tuple[KernelTask, ...], decisions: list[dict[str, int]]) -> Compiled:
    return Compiled(tasks, scheduled(tasks, decisions))


def errors(kernels: Compiled, spec: AttentionSpec) -> list[float]:
    return [worst(kernels, tensors(parse(name).forest, spec)) for name in FORESTS]


@pytest.mark.parametrize("name", SPECS)
def test_default_schedules_are_right(name: str) -> None:
    spec = SPECS[name]
    tiles = default_tiles(spec, "llvm", frozenset(HERE.features))
    # One class at a time, so that each holds all the items. Those of many rows differ in nothing
    # but their number: one spec tries all, the others the fewest and the most.
    for tile in tiles if name == "gqa" else dict.fromkeys((*tiles[:2], tiles[-1])):
        tasks = tasks_for(spec, HERE, [tile])
        assert max(errors(compiled(tasks, [{}, {}]), spec)) <= 1, tile


@pytest.mark.parametrize("operand", ["float16", "bfloat16"])
def test_tiles_of_types_that_no_instruction_takes_are_right(operand: Dtype) -> None:
    """Elements of 16 bits that are not in pairs: no block of them is turned in registers."""
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype=operand)
    tile = TileShape(32, 64, operand)
    features = tuple(name for name in HERE.features if name != "avx512bf16")
    plain = msgspec.structs.replace(HERE, features=features)
    assert max(errors(compiled(tasks_for(spec, plain, [tile]), [{}, {}]), spec)) <= 1


@pytest.mark.parametrize(
    ("name", "lane_rows", "kv_tile"),
    [
        ("group3-f16-hnd", 4, 32),
        ("gqa", 32, 64),
        ("shared-state-bf16", 8, 32),
        ("mqa-bf16", 64, 32),
    ],
)
def test_samples_of_the_space_are_right(name: str, lane_rows: int, kv_tile: int) -> None:
    spec, rng = SPECS[name], random.Random(0)
    operand = spec.dtype if lane_rows >= 16 else "float32"
    tasks = tasks_for(spec, HERE, [TileShape(lane_rows, kv_tile, operand)])
    table = schedule(tasks[0])[1].table
    assert table, "the schedule has choices"
    for _ in range(SAMPLES):
        decision = {knob: rng.choice(candidates) for knob, candidates in table.items()}
        assert max(errors(compiled(tasks, [decision, {}]), spec)) <= 1, decision


def test_portable_schedule_without_avx512() -> None:
    plain = DeviceProfile.nominal(cores=HERE.cores)  # AVX2
    if "avx2" not in HERE.features:
        pytest.skip("this machine has no AVX2")
    for name in ("gqa", "mqa-bf16"):
        tiles = default_tiles(SPECS[name], "llvm", frozenset(plain.features))
        tasks = tasks_for(SPECS[name], plain, tuple(dict.fromkeys((tiles[0], tiles[-1]))))
        assert max(errors(compiled(tasks, [{}] * len(tasks)), SPECS[name])) <= 1


TARGETS = {
    "sapphirerapids": ("+amx-bf16", "tdpbf16ps"),
    "znver4": ("+avx512bf16", "vdpbf16ps"),
    "skylake-avx512": ("", "vfmadd"),
    "haswell": ("", "vfmadd"),
    "neon": ("", "fmla"),
}


@pytest.mark.parametrize(
    ("cpu", "dtype"), [*((cpu, "bfloat16") for cpu in TARGETS), ("neon", "float32")]
)
def test_compiles_to_the_instructions_of_each_cpu(cpu: str, dtype: str) -> None:
    feature, instruction = TARGETS[cpu]
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=dtype)
    profile = _profile(cpu)
    tiles = default_tiles(spec, "llvm", frozenset(profile.features))
    tasks = tasks_for(spec, profile, [t for t in tiles if t.lane_rows in (4, 64)])
    assembly = {}
    for task in tasks:
        module = compile_module(schedule(task)[0].mod, task.target)
        assembly[task.name] = module.mod.inspect_source("asm")
        assert task.symbol in assembly[task.name]
    (many,) = (t for t in tasks if isinstance(t, PartialTask) and t.tile.lane_rows == 64)
    assert len(re.findall(instruction, assembly[many.name])) > 8
    assert many.tile.operand == ("bfloat16" if feature else "float32")


def test_avx2_rounds_in_vectors_and_takes_keys_from_their_pages() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    profile = _profile("haswell")
    tiles = default_tiles(spec, "llvm", frozenset(profile.features))
    few, many, _ = tasks_for(spec, profile, [t for t in tiles if t.lane_rows in (4, 64)])
    modules = {task.name: schedule(task)[0].mod for task in (few, many)}
    assembly = {
        task.name: compile_module(modules[task.name], task.target).mod.inspect_source("asm")
        for task in (few, many)
    }
    assert "vroundps" in assembly[many.name]
    assert "vroundss" not in assembly[many.name], "an exponential of one score at a time"
    assert "_of_bfloat16_in_place" in modules[few.name].script()
    assert not re.search(r"vhaddps\t%ymm", assembly[few.name]), "of products, not of a row's sum"


@pytest.mark.parametrize("name", ["gqa", "gta"])
def test_register_tiles_stay_in_registers(name: str) -> None:
    """No product of pairs is followed by a store of its sum: that takes twice the time."""
    heads = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    spec = AttentionSpec.gqa(**heads) if name == "gqa" else AttentionSpec.gta(**heads, rope_dim=64)
    profile = _profile("znver4")
    tiles = default_tiles(spec, "llvm", frozenset(profile.features))
    tasks = tasks_for(spec, profile, [t for t in tiles if t.lane_rows in (16, 32, 48)])
    for task in (task for task in tasks if isinstance(task, PartialTask)):
        assembly = compile_module(schedule(task)[0].mod, task.target).mod.inspect_source("asm")
        lines = [line.strip() for line in assembly.splitlines()]
        sums = [after for line, after in pairwise(lines) if line.startswith("vdpbf16ps")]
        assert len(sums) > 16, task.name
        assert not [line for line in sums if re.match(r"vmovups\t%zmm\d+, \S*\(", line)], task.name


def _profile(cpu: str) -> DeviceProfile:
    from deft_tvm import device

    level = next(x for x in device._LEVELS if x.mcpu == cpu or (cpu, x.tag) == ("neon", "neon"))
    return DeviceProfile.nominal(2, level.needs, level.vendor or "generic")


@pytest.mark.parametrize("name", ["gqa", "mqa-bf16", "shared-state-bf16"])
def test_scheduling_leaves_its_input_as_it_was(name: str) -> None:
    tiles = default_tiles(SPECS[name], "llvm", frozenset(HERE.features))
    for task in tasks_for(SPECS[name], HERE, tuple(dict.fromkeys((tiles[0], tiles[-1])))):
        module = tvm.IRModule({task.symbol: task.computation})
        before = module.script()
        apply_rules(task, s_tir.Schedule(module), {})
        assert module.script() == before


def test_a_decision_that_is_no_candidate_is_refused() -> None:
    task = tasks_for(SPECS["gqa"], HERE)[-2]
    with pytest.raises(PlanError, match=r"decision 'score_rows' is 7; expected one of \("):
        schedule(task, {"score_rows": 7})


def test_every_group_has_a_tile_class_that_holds_a_row() -> None:
    for group in (1, 2, 3, 4, 8, 12, 16, 24, 64, 128, 256):
        spec = AttentionSpec.gqa(num_q_heads=group, num_kv_heads=1, head_dim=64)
        for kind in ("llvm", "cuda"):
            tiles = default_tiles(spec, kind, frozenset(HERE.features))
            assert tiles[-1].lane_rows >= group
            assert [t.lane_rows for t in tiles] == sorted({t.lane_rows for t in tiles})

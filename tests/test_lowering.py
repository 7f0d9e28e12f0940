"""What a CPU's lowering does to scheduled kernels: loops that end early, stages in one place."""

from __future__ import annotations

from functools import cache

import pytest
import tvm_ffi
from test_device import AMX, V3, V4, ZEN4
from tvm import IRModule, tirx, transform
from tvm.s_tir import SBlockRealize
from tvm.script import tirx as T

from deft_tvm.build import lower, tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.plan import CostModel
from deft_tvm.schedules import PartialTask
from deft_tvm.schedules.cpu.in_place import write_in_place
from deft_tvm.schedules.cpu.lowering import _pipeline, settle_registers
from deft_tvm.schedules.cpu.trimmed import BLOCK, LANE_ROWS, LANES, trim_rows
from deft_tvm.schedules.cpu.vector import REGISTERS
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec

LARGEST = 128
KV_TILE = 64
SPECS = {
    "gqa": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64),
    "mqa-bf16": AttentionSpec.gqa(num_q_heads=16, num_kv_heads=1, head_dim=64, dtype="bfloat16"),
    "mla-bf16": AttentionSpec.mla(
        num_q_heads=16,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        dtype="bfloat16",
    ),
}
DEVICES = {
    name: DeviceProfile.nominal(features=features, vendor="amd")
    for name, features in {"avx2": V3, "avx512": V4, "zen4": ZEN4, "amx": AMX}.items()
}
KERNELS = [
    ("avx2", "gqa"),
    ("avx2", "mla-bf16"),
    ("avx512", "gqa"),
    ("zen4", "gqa"),
    ("zen4", "mqa-bf16"),
    ("zen4", "mla-bf16"),
    ("amx", "mqa-bf16"),
]


@pytest.mark.parametrize(("device", "name"), KERNELS)
def test_loops_over_lane_rows_end_with_the_item(device: str, name: str) -> None:
    module = _before_trimming(device, name)
    loops = [loop for loop in _loops(module) if LANE_ROWS in loop.annotations]
    steps = [LARGEST // int(loop.extent) for loop in loops]
    assert len(steps) > 15
    trimmed = trim_rows(module)
    assert not any(_is_told(loop) for loop in _loops(trimmed))
    ended = [loop for loop in _loops(trimmed) if "lanes" in str(loop.extent)]
    halves = [loop for loop in ended if not isinstance(loop.min, tirx.IntImm)]
    whole = [loop for loop in ended if isinstance(loop.min, tirx.IntImm)]
    granule = _granule(device, name)
    assert granule == max(steps) // (2 if halves else 1)
    for rows in range(1, LARGEST + 1):
        last = -(-rows // granule) * granule
        for step, loop in zip(steps, whole, strict=True):
            covered = step * _extent(loop, rows)
            # A product's half has the name of its loop over whole blocks.
            half = [each for each in halves if str(each.loop_var) == str(loop.loop_var)]
            assert covered >= last - (granule if half else 0)
            assert covered < last + step
        for loop in halves:
            assert _extent(loop, rows) == last // granule % 2


@pytest.mark.parametrize(("device", "name"), KERNELS[:-1])
def test_products_take_what_traffic_counts(device: str, name: str) -> None:
    """33 rows take 40 in float32, whose blocks have 16, and 48 in bfloat16, whose have 32."""
    trimmed = trim_rows(_before_trimming(device, name))
    loops = [loop for loop in _loops(trimmed) if "lanes" in str(loop.extent)]
    granule = _granule(device, name)
    assert granule == (16 if device == "zen4" and "bf16" in name else 8)
    for tile, deep in (("S", KV_TILE), ("A_new", SPECS[name].v_width)):
        elements = [_elements(loop.body, tile) for loop in loops]
        for rows in range(1, LARGEST + 1):
            taken = sum(_extent(loop, rows) * n for loop, n in zip(loops, elements, strict=True))
            assert taken == -(-rows // granule) * granule * deep


@pytest.mark.parametrize("scope", ["global", REGISTERS])
def test_a_successor_takes_the_place_of_what_it_is_made_of(scope: str) -> None:
    @T.prim_func
    def kernel(data: T.Buffer((16,), "float32")) -> None:
        S = T.alloc_buffer((16,), "float32")
        X = T.alloc_buffer((16,), "float32")
        E = T.alloc_buffer((16,), "float32", scope=scope)
        for i in range(16):
            S[i] = data[i]
        for i in range(16):
            X[i] = S[i] * T.float32(2)
        for i in range(16):
            E[i] = X[i] + T.float32(1)
        for i in range(16):
            data[i] = E[i]

    assert _buffers(kernel) == {"S", "X", "E"}
    # What must stay in registers keeps a place of its own.
    left = {"S"} if scope == "global" else {"S", "E"}
    assert _buffers(_passed(kernel, write_in_place)) == left


def test_what_is_made_of_other_elements_keeps_its_place() -> None:
    @T.prim_func
    def kernel(data: T.Buffer((16,), "float32")) -> None:
        S = T.alloc_buffer((16,), "float32")
        X = T.alloc_buffer((16,), "float32")
        A = T.alloc_buffer((16,), "float32")
        A_new = T.alloc_buffer((8,), "float32")
        for i in range(16):
            S[i] = data[i]
            A[i] = data[i]
        for i in range(16):
            X[i] = S[15 - i]
        for i in range(8):
            A_new[i] = A[i]
        for i in range(8):
            data[i] = X[i] + A_new[i]

    assert _buffers(_passed(kernel, write_in_place)) == {"S", "X", "A", "A_new"}


def test_a_copy_back_is_dropped() -> None:
    @T.prim_func
    def kernel(data: T.Buffer((16,), "float32")) -> None:
        A = T.alloc_buffer((16,), "float32")
        A_new = T.alloc_buffer((16,), "float32")
        for i in range(16):
            A[i] = data[i]
        for i in range(16):
            A_new[i] = A[i] * T.float32(3)
        for i in range(16):
            A[i] = A_new[i]
        for i in range(16):
            data[i] = A[i]

    merged = _passed(kernel, write_in_place)
    assert _buffers(merged) == {"A"}
    assert len(_found(merged, tirx.BufferStore)) == 3


@pytest.mark.parametrize("head", [0, 1], ids=["its own", "another"])
def test_a_part_takes_the_place_of_what_it_is_made_of(head: int) -> None:
    """One head's output of all heads', if it is made of the old output of that head."""

    @T.prim_func
    def kernel(data: T.Buffer((48,), "float32")) -> None:
        A = T.alloc_buffer((48,), "float32")
        for i in range(48):
            A[i] = data[i]
        for h in range(2):
            A_new = T.alloc_buffer((16,), "float32")
            for i in range(16):
                A_new[i] = A[(h + head) * 16 + i] * T.float32(3)
            for i in range(16):
                A[h * 16 + i] = A_new[i]
        for i in range(48):
            data[i] = A[i]

    merged = _passed(kernel, write_in_place)
    assert _buffers(merged) == ({"A", "A_new"} if head else {"A"})
    assert len(_found(merged, tirx.BufferStore)) == (4 if head else 3)


def test_register_tiles_get_the_scope_of_the_stack() -> None:
    @T.prim_func
    def kernel(data: T.Buffer((16,), "float32")) -> None:
        tile = T.alloc_buffer((16,), "float32", scope=REGISTERS)
        for i in range(16):
            tile[i] = data[i]
        for i in range(16):
            data[i] = tile[i] + T.float32(1)

    scopes = {a.buffer.scope() for a in _found(kernel, tirx.AllocBuffer)}
    settled = {
        a.buffer.scope() for a in _found(_passed(kernel, settle_registers), tirx.AllocBuffer)
    }
    assert (scopes, settled) == ({REGISTERS}, {"global"})


def _passed(kernel: tirx.PrimFunc, by) -> tirx.PrimFunc:
    return by(IRModule({"kernel": kernel}))["kernel"]


def _buffers(kernel: tirx.PrimFunc) -> set[str]:
    return {allocation.buffer.name for allocation in _found(kernel, tirx.AllocBuffer)}


@cache
def _before_trimming(device: str, name: str) -> IRModule:
    """The kernel of the class with `LARGEST` lane rows, as it comes to `trim_rows`."""
    tasks = tasks_for(SPECS[name], DEVICES[device])
    module = lower([t for t in tasks if isinstance(t, PartialTask) and t.tile.lane_rows == LARGEST])
    passes = list(_pipeline()[0].passes)
    names = [each.info.name for each in passes]
    return transform.Sequential(passes[: names.index(trim_rows.info.name)])(module)


def _granule(device: str, name: str) -> int:
    """What traffic counts of that class."""
    profile = DEVICES[device]
    tiles = default_tiles(SPECS[name], "llvm", frozenset(profile.features))
    (tile,) = (tile for tile in tiles if tile.lane_rows == LARGEST)
    return CostModel.from_profile(profile).block(tile)[1]


def _is_told(loop: tirx.For) -> bool:
    return LANE_ROWS in loop.annotations or BLOCK in loop.annotations


def _extent(loop: tirx.For, rows: int) -> int:
    """How many times a loop goes round for an item of so many lane rows."""
    return eval(str(loop.extent), {LANES: rows})


def _elements(body: tirx.Stmt, tile: str) -> int:
    """How many elements of a tile are stored out of registers."""
    if isinstance(body, tirx.For):
        return int(body.extent) * _elements(body.body, tile)
    if isinstance(body, tirx.SeqStmt):
        return sum(_elements(stage, tile) for stage in body.seq)
    if isinstance(body, SBlockRealize):
        return _elements(body.block.body, tile)
    if not isinstance(body, tirx.BufferStore) or body.buffer.name != tile:
        return 0
    return int("registers" in str(body.value))


def _loops(module: IRModule) -> list[tirx.For]:
    return [loop for kernel in module.functions.values() for loop in _found(kernel, tirx.For)]


def _found(kernel: tirx.PrimFunc, kind: type) -> list:
    found: list = []
    tvm_ffi.structural_walk(kernel.body, [(kind, found.append)])
    return found

"""What a CPU's lowering does to scheduled kernels: loops that end early, stages in one place."""

from __future__ import annotations

import pytest
import tvm_ffi
from tvm import IRModule, tirx
from tvm.script import tirx as T

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.schedules import schedule
from deft_tvm.schedules.cpu.in_place import write_in_place
from deft_tvm.schedules.cpu.lowering import LANE_ROWS, settle_registers, trim_rows
from deft_tvm.schedules.cpu.vector import REGISTERS
from deft_tvm.spec import AttentionSpec

LARGEST = 128
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


@pytest.mark.parametrize("name", SPECS)
def test_loops_over_lane_rows_end_with_the_item(name: str) -> None:
    tasks = tasks_for(SPECS[name], DeviceProfile.detect())
    (task,) = (t for t in tasks if t.tile is not None and t.tile.lane_rows == LARGEST)
    module = schedule(task)[0].mod
    extents = [int(loop.extent) for loop in _loops(module) if LANE_ROWS in loop.annotations]
    assert len(extents) > 15
    block = LARGEST // min(extents)
    trimmed = trim_rows(module)
    assert not any(LANE_ROWS in loop.annotations for loop in _loops(trimmed))
    ended = [str(loop.extent) for loop in _loops(trimmed) if "lanes" in str(loop.extent)]
    assert len(ended) == len(extents)
    for extent, text in zip(extents, ended, strict=True):
        # All cover the blocks that hold rows: the whole tile, where an item fills it.
        steps = extent * block // LARGEST
        assert steps * (LARGEST // block) == extent
        assert f"(lanes + {block - 1}) // {block}" in text
        assert steps == 1 or text.endswith(f"* {steps}")


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


def _loops(module: IRModule) -> list[tirx.For]:
    return [loop for kernel in module.functions.values() for loop in _found(kernel, tirx.For)]


def _found(kernel: tirx.PrimFunc, kind: type) -> list:
    found: list = []
    tvm_ffi.structural_walk(kernel.body, [(kind, found.append)])
    return found

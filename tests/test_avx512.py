"""Schedules for AVX512 and AVX512-BF16, where the processor has neither.

Vectors of 16 elements are LLVM's, which takes two of 8 for one where it must. The instructions for
bfloat16 are replaced by what Intel's manual says they do, up to the order in which two products are
added. Such a machine runs the same schedules natively in every other test of kernels.
"""

from __future__ import annotations

import re

import pytest
import tvm
import tvm_ffi
from compiled import Compiled, scheduled, tasks_with, worst
from test_device import ZEN4
from tvm import tirx

from deft_tvm.device import DeviceProfile
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.workloads import parse, tensors

HERE = DeviceProfile.detect()
PRAGMA = "pragma_import_llvm"

SPECS = {
    "gqa": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64),
    "gqa-bf16": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16"),
    "rope-bf16": AttentionSpec(
        num_q_heads=8,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 64, "bfloat16"), CacheBuffer("rope", 1, 32, "bfloat16")),
        k=Region(0, 0, 32),
        v=Region(0, 0, 64),
        rope=1,
        scale=0.125,
        dtype="bfloat16",
    ),
}
ROWS = (1, 2, 4, 5, 8, 9, 10, 12, 13, 16)
"""Of 4 lane rows each: every half of a block of 16 or of 32, of a class of 64."""
ONE_VECTOR = {"score_rows": 16, "score_tokens": 16, "out_rows": 16, "out_dims": 8}


@pytest.mark.parametrize(
    ("name", "lane_rows", "decision"),
    [
        ("gqa", 64, {}),
        ("gqa", 64, ONE_VECTOR),
        ("gqa", 32, ONE_VECTOR | {"out_rows": 32}),
        ("gqa-bf16", 64, {}),
        ("gqa-bf16", 48, {}),
        ("gqa-bf16", 4, {}),
        ("rope-bf16", 64, {}),
    ],
)
def test_wider_vectors_are_right(name: str, lane_rows: int, decision: dict[str, int]) -> None:
    spec = SPECS[name]
    operand = "bfloat16" if name.endswith("bf16") else "float32"
    tasks = tasks_with(ZEN4, spec, [TileShape(lane_rows, 32, operand)])
    module = scheduled(tasks, [decision, {}])
    if "avx512bf16" not in HERE.features:
        module = _without_bfloat16(module)
    kernels = Compiled(tasks, module)
    for rows in ROWS:
        forest = parse(f"few_shot:prompt=100,branches={rows},tokens=5").forest
        assert worst(kernels, tensors(forest, spec)) <= 1, rows
    assert worst(kernels, tensors(parse("speculative:nodes=26,context=90").forest, spec)) <= 1


def _without_bfloat16(module: tvm.IRModule) -> tvm.IRModule:
    """The module with functions in place of the instructions for bfloat16."""

    def replace(loop: tirx.For) -> tirx.For:
        if PRAGMA not in loop.annotations:
            return loop
        annotations = {**loop.annotations, PRAGMA: _emulated(str(loop.annotations[PRAGMA]))}
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, loop.body, loop.thread_binding,
            annotations,
        )  # fmt: skip

    functions = {
        name: function.with_body(
            tvm_ffi.structural_map(function.body, [(tirx.For, replace)], order="post")
        )
        for name, function in module.functions.items()
    }
    return tvm.IRModule(functions)


def _emulated(text: str) -> str:
    used = re.findall(r"declare .*?@llvm\.x86\.avx512bf16\.(\w+)\.(\d+)\(.*\n", text)
    text = re.sub(r"declare .*?@llvm\.x86\.avx512bf16\..*\n", "", text)
    text = text.replace("@llvm.x86.avx512bf16.", "@emulated_")
    made = {"dpbf16ps": _dpbf16ps, "cvtne2ps2bf16": _cvtne2ps2bf16}
    return text + "".join(made[name](int(bits) // 32) for name, bits in sorted(set(used)))


def _dpbf16ps(lanes: int) -> str:
    """c + the products of odd elements + those of even ones."""
    f, i, pairs = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    lines = []
    for x in "ab":
        lines += [
            f"%{x}_bits = bitcast {pairs} %{x} to {i}",
            f"%{x}_even_bits = shl {i} %{x}_bits, {_splat(lanes, 16)}",
            f"%{x}_odd_bits = and {i} %{x}_bits, {_splat(lanes, -65536)}",
            f"%{x}_even = bitcast {i} %{x}_even_bits to {f}",
            f"%{x}_odd = bitcast {i} %{x}_odd_bits to {f}",
        ]
    lines += [
        f"%odd = call {f} @llvm.fma.v{lanes}f32({f} %a_odd, {f} %b_odd, {f} %c)",
        f"%sum = call {f} @llvm.fma.v{lanes}f32({f} %a_even, {f} %b_even, {f} %odd)",
        f"ret {f} %sum",
    ]
    fma = f"declare {f} @llvm.fma.v{lanes}f32({f}, {f}, {f})\n"
    name = f"emulated_dpbf16ps.{32 * lanes}"
    return fma + _function(f"{f} @{name}({f} %c, {pairs} %a, {pairs} %b)", lines)


def _cvtne2ps2bf16(lanes: int) -> str:
    """Elements of b, then those of a, rounded to even."""
    f, i, both = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    lines = []
    for x in "ab":
        lines += [
            f"%{x}_bits = bitcast {f} %{x} to {i}",
            f"%{x}_upper = lshr {i} %{x}_bits, {_splat(lanes, 16)}",
            f"%{x}_last = and {i} %{x}_upper, {_splat(lanes, 1)}",
            f"%{x}_more = add {i} %{x}_last, {_splat(lanes, 32767)}",
            f"%{x}_sum = add {i} %{x}_bits, %{x}_more",
            f"%{x}_high = lshr {i} %{x}_sum, {_splat(lanes, 16)}",
            f"%{x}_half = trunc {i} %{x}_high to <{lanes} x i16>",
        ]
    order = ", ".join(f"i32 {n}" for n in range(2 * lanes))
    lines += [
        f"%halves = shufflevector <{lanes} x i16> %b_half, <{lanes} x i16> %a_half, "
        f"<{2 * lanes} x i32> <{order}>",
        f"%made = bitcast <{2 * lanes} x i16> %halves to {both}",
        f"ret {both} %made",
    ]
    return _function(f"{both} @emulated_cvtne2ps2bf16.{32 * lanes}({f} %a, {f} %b)", lines)


def _function(signature: str, lines: list[str]) -> str:
    body = "\n  ".join(lines)
    return f"define {signature} alwaysinline {{\n  {body}\n}}\n"


def _splat(lanes: int, value: int) -> str:
    return f"<{', '.join([f'i32 {value}'] * lanes)}>"

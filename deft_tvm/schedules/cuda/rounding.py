"""Probabilities rounded to the operand's type in pairs, by one instruction for two."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm.script import tirx as T

from deft_tvm.dtypes import SHORT_DTYPE
from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import narrow, storage
from deft_tvm.schedules.cuda.intrinsics import HELD, SIDE, fragment_of
from deft_tvm.schedules.cuda.shares import FRAGMENT
from deft_tvm.schedules.cuda.threads import LANES, TILE_SCOPE
from deft_tvm.schedules.verbs import register

INSTRUCTIONS = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}

# A register pair of a fragment holds neighbouring columns, and so do 32 bits of a tile's row.
ROUNDING = """
#ifndef DEFT_ROUNDING_%(type)s
#define DEFT_ROUNDING_%(type)s
__device__ __forceinline__ void deft_round_%(type)s(void* held, const float* x) {
  unsigned* pairs = (unsigned*)held;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("%(instruction)s %%0, %%1, %%2;" : "=r"(pairs[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  }
}
__device__ __forceinline__ void deft_round_to_tile_%(type)s(
    void* corner, int pitch, const float* x) {
  unsigned pairs[4];
  deft_round_%(type)s(pairs, x);
  unsigned short* place = (unsigned short*)corner;
  *(unsigned*)place = pairs[0];
  *(unsigned*)(place + 8 * pitch) = pairs[1];
  *(unsigned*)(place + 8) = pairs[2];
  *(unsigned*)(place + 8 * pitch + 8) = pairs[3];
}
#endif
"""


@cache
def round_fragment(operand: str) -> str:
    """The intrinsic that rounds an accumulator to a left factor, both in fragments."""
    element, kind, text = storage(operand), SHORT_DTYPE[operand], _text(operand)

    @script.prim_func(s_tir=True)
    def implementation(x_handle: T.handle, p_handle: T.handle) -> None:
        x = T.match_buffer(x_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        p = T.match_buffer(p_handle, (LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        with T.sblock("root"):
            T.reads(x[0:LANES, 0:HELD])
            T.writes(p[0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        f"deft_round_{kind}",
                        T.address_of(p[lane, 0]),
                        T.address_of(x[lane, 0]),
                        source_code=text,
                    )
                )

    described = _description(operand, (LANES, HELD), FRAGMENT, fragment_of)
    return register(f"deft_tvm.round_{operand}", described, implementation)


@cache
def round_to_tile(operand: str) -> str:
    """The intrinsic that rounds an accumulator into a tile in shared memory."""
    element, kind, text = storage(operand), SHORT_DTYPE[operand], _text(operand)

    @script.prim_func(s_tir=True)
    def implementation(x_handle: T.handle, p_handle: T.handle) -> None:
        pitch = T.int32()
        x = T.match_buffer(x_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        p = T.match_buffer(
            p_handle,
            (SIDE, SIDE),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[pitch, T.int32(1)],
        )
        with T.sblock("root"):
            T.reads(x[0:LANES, 0:HELD])
            T.writes(p[0:SIDE, 0:SIDE])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        f"deft_round_to_tile_{kind}",
                        p.access_ptr("w", offset=lane // 4 * pitch + lane % 4 * 2),
                        pitch,
                        T.address_of(x[lane, 0]),
                        source_code=text,
                    )
                )

    described = _description(operand, (SIDE, SIDE), TILE_SCOPE, lambda i, j: (i, j))
    return register(f"deft_tvm.round_to_tile_{operand}", described, implementation)


def _text(operand: str) -> str:
    return ROUNDING % {"type": SHORT_DTYPE[operand], "instruction": INSTRUCTIONS[operand]}


def _description(
    operand: str, shape: tuple[int, int], scope: str, place: Callable[[Any, Any], tuple[Any, Any]]
) -> Any:
    """What is done: each element goes to its `place`."""
    element = storage(operand)
    rows, columns = shape

    @script.prim_func(s_tir=True)
    def description(x_handle: T.handle, p_handle: T.handle) -> None:
        x = T.match_buffer(x_handle, (LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1)
        p = T.match_buffer(p_handle, (rows, columns), element, scope=scope, offset_factor=1)
        with T.sblock("root"):
            T.reads(x[0:LANES, 0:HELD])
            T.writes(p[0:rows, 0:columns])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("round"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    lane, register = T.meta_var(fragment_of(vi, vj))
                    row, column = T.meta_var(place(vi, vj))
                    T.reads(x[lane, register])
                    T.writes(p[row, column])
                    p[row, column] = narrow(x[lane, register], operand)

    return description

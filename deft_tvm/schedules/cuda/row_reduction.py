"""Maximum and sum of rows whose elements lie in accumulator fragments."""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.schedules.cuda.intrinsics import HELD, SIDE, fragment_of
from deft_tvm.schedules.cuda.shares import FRAGMENT, QUAD_ROWS
from deft_tvm.schedules.cuda.threads import LANES
from deft_tvm.schedules.verbs import register

# A lane holds parts of two rows, 8 apart; the four lanes of a quad hold the same two.
ROW_REDUCTION = """
__device__ __forceinline__ void deft_row_%(name)s_%(tiles)d(const float* x, float* result) {
  float upper = %(zero)s, lower = %(zero)s;
#pragma unroll
  for (int i = 0; i < %(tiles)d * 8; i += 4) {
    upper = %(upper)s;
    lower = %(lower)s;
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    float other_upper = __shfl_xor_sync(0xffffffffu, upper, step);
    float other_lower = __shfl_xor_sync(0xffffffffu, lower, step);
    upper = %(join_upper)s;
    lower = %(join_lower)s;
  }
  result[0] = %(keep_upper)s;
  result[1] = %(keep_lower)s;
}
"""


@cache
def reduce_rows(name: str, columns: int) -> str:
    """The intrinsic for the ``max`` or ``sum`` of each of 16 rows of accumulators."""
    tiles = columns // SIDE
    maximum = name == "max"
    function = f"deft_row_{name}_{tiles}"
    text = ROW_REDUCTION % {"name": name, "tiles": tiles, **_steps(maximum)}

    @script.prim_func(s_tir=True)
    def description(x_handle: T.handle, result_handle: T.handle) -> None:
        x = T.match_buffer(
            x_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        result = T.match_buffer(result_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        with T.sblock("root"):
            T.reads(result[0:SIDE], x[0:tiles, 0:LANES, 0:HELD])
            T.writes(result[0:SIDE])
            for i, j in T.grid(SIDE, columns):
                with T.sblock("reduce"):
                    vi, vj = T.axis.remap("SR", [i, j])
                    lane, register = T.meta_var(fragment_of(vi, vj % SIDE))
                    T.reads(result[vi], x[vj // SIDE, lane, register])
                    T.writes(result[vi])
                    if maximum:
                        result[vi] = T.max(result[vi], x[vj // SIDE, lane, register])
                    else:
                        result[vi] = result[vi] + x[vj // SIDE, lane, register]

    @script.prim_func(s_tir=True)
    def implementation(x_handle: T.handle, result_handle: T.handle) -> None:
        x = T.match_buffer(
            x_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        result = T.match_buffer(result_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        with T.sblock("root"):
            T.reads(result[0:SIDE], x[0:tiles, 0:LANES, 0:HELD])
            T.writes(result[0:SIDE])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        function,
                        T.address_of(x[0, lane, 0]),
                        T.address_of(result[lane // 4]),
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.row_{name}_{tiles}", description, implementation)


def _steps(maximum: bool) -> dict[str, str]:
    """The expressions of `ROW_REDUCTION`."""
    joined = "fmaxf({0}, {1})" if maximum else "{0} + {1}"
    return {
        "zero": "-INFINITY" if maximum else "0.0f",
        "upper": joined.format("upper", joined.format("x[i]", "x[i + 1]")),
        "lower": joined.format("lower", joined.format("x[i + 2]", "x[i + 3]")),
        "join_upper": joined.format("upper", "other_upper"),
        "join_lower": joined.format("lower", "other_lower"),
        "keep_upper": joined.format("result[0]", "upper"),
        "keep_lower": joined.format("result[1]", "lower"),
    }

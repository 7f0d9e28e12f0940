"""Products of four warps at once: ``wgmma`` of Hopper (PTX ISA, "asynchronous warpgroup level
matrix multiply-accumulate") as tensor intrinsics.

Each of the four has 16 of 64 rows, in the fragments that ``mma`` has, too. Tokens are read where
they lie in shared memory, by the hardware itself: no warp loads them into registers, and scores
take their rows from there as well. For that a tile lies in *panels* of 64 columns, 128 bytes a row,
whose 16-byte pieces are permuted by `copies.PERMUTED`: [panel, row, column].

What an intrinsic describes is one warp's part. The four of a group call it together; they are
those with neighbouring numbers, so the first one's rows begin where the group's do.
"""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from deft_tvm.dtypes import SHORT_DTYPE
from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import storage, widen
from deft_tvm.plan.residency import GROUP_ROWS, PANEL
from deft_tvm.schedules.cuda.intrinsics import HELD, SIDE, fragment_of
from deft_tvm.schedules.cuda.shares import FRAGMENT, QUAD_ROWS
from deft_tvm.schedules.cuda.threads import LANES, TILE_SCOPE
from deft_tvm.schedules.verbs import register

GROUP_ELEMENTS = GROUP_ROWS * PANEL
"""Of the first panel, where the group's rows begin at a multiple of these."""
MOST_COLUMNS = 256
"""Of one instruction."""

DESCRIPTORS = """
#ifndef DEFT_PANELS
#define DEFT_PANELS
__device__ __forceinline__ unsigned deft_panels(const void* tile, int panel_bytes) {
  return (unsigned)__cvta_generic_to_shared(tile) >> 4 | panel_bytes >> 4 << 16;
}
__device__ __forceinline__ uint64_t deft_descriptor(unsigned panels, int bytes) {
  return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | (panels + (bytes >> 4));
}
__device__ __forceinline__ void deft_group_begins() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void deft_group_ends() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#endif
"""
"""A descriptor says in its lower half where a tile begins and how far its panels are apart, and in
its upper half that eight rows of a panel, of 128 bytes each, are permuted among themselves."""

INSTRUCTION = """
#ifndef DEFT_%(name)s
#define DEFT_%(name)s
__device__ __forceinline__ void deft_%(name)s(float* c, %(left_type)s a, uint64_t b, int onto) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %%%(onto)d, 0; "
    "wgmma.mma_async.sync.aligned.m64n%(columns)dk16.f32.%(type)s.%(type)s "
    "{%(sums)s}, %(left)s, %%%(right)d, p, 1, 1, %(transposed)s;}"
    : %(outputs)s : %(inputs)s, "l"(b), "r"(onto));
}
#endif
"""

SCORES = """
__device__ __forceinline__ void deft_group_scores_%(type)s_%(columns)d_%(width)d(
    float* c, const void* a, int a_panel, const void* b, int b_panel) {
  unsigned left = deft_panels(a, 16), right = deft_panels(b, 16);
  deft_group_begins();
#pragma unroll
  for (int k = 0; k < %(width)d / 16; ++k)
    deft_%(name)s(c, deft_descriptor(left, k / 4 * a_panel * 2 + k %% 4 * 32),
      deft_descriptor(right, k / 4 * b_panel * 2 + k %% 4 * 32), k > 0);
  deft_group_ends();
}
"""

SUMS = """
__device__ __forceinline__ void deft_group_sums_%(type)s_%(columns)d_%(depth)d(
    float* c, const float* old, const float* factor, const void* a, const void* b, int b_panel) {
  if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < %(columns)d / 2; ++i) c[i] = old[i] * factor[i / 2 %% 2];
  } else {
#pragma unroll
    for (int i = 0; i < %(columns)d / 2; ++i) c[i] = old[i];
  }
  unsigned right = deft_panels(b, b_panel * 2);
  deft_group_begins();
#pragma unroll
  for (int k = 0; k < %(depth)d / 16; ++k)
    deft_%(name)s(c, (const unsigned*)a + 4 * k, deft_descriptor(right, k * 2048), 1);
  deft_group_ends();
}
"""


@cache
def group_scores(operand: str, width: int, columns: int) -> str:
    """The intrinsic for 16 rows times `columns` tokens, both `width` wide and in panels.

    The sums that it adds to are zero, which only makes them so again: it begins with zero itself.
    """
    element, kind = storage(operand), SHORT_DTYPE[operand]
    panels, tiles = width // PANEL, columns // SIDE
    name, instruction = _instruction(kind, columns, left_in_registers=False)
    values = {"type": kind, "columns": columns, "width": width, "name": name}
    text = DESCRIPTORS + instruction + SCORES % values
    function = f"deft_group_scores_{kind}_{columns}_{width}"

    @script.prim_func(s_tir=True)
    def description(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a = T.match_buffer(
            a_handle, (panels, SIDE, PANEL), element, scope=TILE_SCOPE, offset_factor=1
        )
        b = T.match_buffer(
            b_handle, (panels, columns, PANEL), element, scope=TILE_SCOPE, offset_factor=1
        )
        c = T.match_buffer(
            c_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads(
                c[0:tiles, 0:LANES, 0:HELD],
                a[0:panels, 0:SIDE, 0:PANEL],
                b[0:panels, 0:columns, 0:PANEL],
            )
            T.writes(c[0:tiles, 0:LANES, 0:HELD])
            for i, n, k in T.grid(SIDE, columns, width):
                with T.sblock("multiply"):
                    vi, vn, vk = T.axis.remap("SSR", [i, n, k])
                    lane, register = T.meta_var(fragment_of(vi, vn % SIDE))
                    T.reads(
                        c[vn // SIDE, lane, register],
                        a[vk // PANEL, vi, vk % PANEL],
                        b[vk // PANEL, vn, vk % PANEL],
                    )
                    T.writes(c[vn // SIDE, lane, register])
                    c[vn // SIDE, lane, register] = c[vn // SIDE, lane, register] + widen(
                        a[vk // PANEL, vi, vk % PANEL], operand
                    ) * widen(b[vk // PANEL, vn, vk % PANEL], operand)

    @script.prim_func(s_tir=True)
    def implementation(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a_panel, b_panel = T.int32(), T.int32()
        a = T.match_buffer(
            a_handle,
            (panels, SIDE, PANEL),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[a_panel, T.int32(PANEL), T.int32(1)],
        )
        b = T.match_buffer(
            b_handle,
            (panels, columns, PANEL),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[b_panel, T.int32(PANEL), T.int32(1)],
        )
        c = T.match_buffer(
            c_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        group_begin = T.meta_var(a.elem_offset // GROUP_ELEMENTS * GROUP_ELEMENTS)
        with T.sblock("root"):
            T.reads(
                c[0:tiles, 0:LANES, 0:HELD],
                a[0:panels, 0:SIDE, 0:PANEL],
                b[0:panels, 0:columns, 0:PANEL],
            )
            T.writes(c[0:tiles, 0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        function,
                        T.address_of(c[0, lane, 0]),
                        a.access_ptr("r", offset=group_begin - a.elem_offset),
                        a_panel,
                        b.access_ptr("r"),
                        b_panel,
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.{function}", description, implementation)


@cache
def group_sums(operand: str, columns: int, depth: int) -> str:
    """The intrinsic that adds to 16 rows of `columns` sums their weights times `depth` tokens in
    panels.

    What it adds to are the old sums times their rows' factors, and it multiplies them itself. It
    rarely has to: a row's maximum grows with its first tokens and hardly after them, and where
    every factor of a warp is 1 the sums are left as they are.
    """
    element, kind = storage(operand), SHORT_DTYPE[operand]
    panels, tiles, steps = columns // PANEL, columns // SIDE, depth // SIDE
    name, instruction = _instruction(kind, columns, left_in_registers=True)
    values = {"type": kind, "columns": columns, "depth": depth, "name": name}
    text = DESCRIPTORS + instruction + SUMS % values
    function = f"deft_group_sums_{kind}_{columns}_{depth}"

    @script.prim_func(s_tir=True)
    def description(
        old_handle: T.handle,
        factor_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        c_handle: T.handle,
    ) -> None:
        old = T.match_buffer(
            old_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        factor = T.match_buffer(factor_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        a = T.match_buffer(a_handle, (steps, LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(
            b_handle, (panels, depth, PANEL), element, scope=TILE_SCOPE, offset_factor=1
        )
        c = T.match_buffer(
            c_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads(
                c[0:tiles, 0:LANES, 0:HELD],
                old[0:tiles, 0:LANES, 0:HELD],
                factor[0:SIDE],
                a[0:steps, 0:LANES, 0:HELD],
                b[0:panels, 0:depth, 0:PANEL],
            )
            T.writes(c[0:tiles, 0:LANES, 0:HELD])
            for i, n, k in T.grid(SIDE, columns, depth):
                with T.sblock("multiply"):
                    vi, vn, vk = T.axis.remap("SSR", [i, n, k])
                    lane_c, register_c = T.meta_var(fragment_of(vi, vn % SIDE))
                    lane_a, register_a = T.meta_var(fragment_of(vi, vk % SIDE))
                    T.reads(
                        c[vn // SIDE, lane_c, register_c],
                        old[vn // SIDE, lane_c, register_c],
                        factor[vi],
                        a[vk // SIDE, lane_a, register_a],
                        b[vn // PANEL, vk, vn % PANEL],
                    )
                    T.writes(c[vn // SIDE, lane_c, register_c])
                    c[vn // SIDE, lane_c, register_c] = c[vn // SIDE, lane_c, register_c] + widen(
                        a[vk // SIDE, lane_a, register_a], operand
                    ) * widen(b[vn // PANEL, vk, vn % PANEL], operand)

    @script.prim_func(s_tir=True)
    def implementation(
        old_handle: T.handle,
        factor_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        c_handle: T.handle,
    ) -> None:
        b_panel = T.int32()
        old = T.match_buffer(
            old_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        factor = T.match_buffer(factor_handle, (SIDE,), "float32", scope=QUAD_ROWS, offset_factor=1)
        a = T.match_buffer(a_handle, (steps, LANES, HELD), element, scope=FRAGMENT, offset_factor=1)
        b = T.match_buffer(
            b_handle,
            (panels, depth, PANEL),
            element,
            scope=TILE_SCOPE,
            offset_factor=1,
            strides=[b_panel, T.int32(PANEL), T.int32(1)],
        )
        c = T.match_buffer(
            c_handle, (tiles, LANES, HELD), "float32", scope=FRAGMENT, offset_factor=1
        )
        with T.sblock("root"):
            T.reads(
                c[0:tiles, 0:LANES, 0:HELD],
                old[0:tiles, 0:LANES, 0:HELD],
                factor[0:SIDE],
                a[0:steps, 0:LANES, 0:HELD],
                b[0:panels, 0:depth, 0:PANEL],
            )
            T.writes(c[0:tiles, 0:LANES, 0:HELD])
            for lane in T.thread_binding(LANES, thread="threadIdx.x"):
                T.evaluate(
                    T.cuda.func_call(
                        function,
                        T.address_of(c[0, lane, 0]),
                        T.address_of(old[0, lane, 0]),
                        T.address_of(factor[lane // 4]),
                        T.address_of(a[0, lane, 0]),
                        b.access_ptr("r"),
                        b_panel,
                        source_code=text,
                    )
                )

    return register(f"deft_tvm.{function}", description, implementation)


def _instruction(kind: str, columns: int, left_in_registers: bool) -> tuple[str, str]:
    """Name and text of the function for one instruction: 64 rows, 16 deep.

    The left factor is what a lane holds of it, or a descriptor; then the right one's columns lie
    side by side, or its depth does.
    """
    sums = columns // 2
    name = f"wgmma_{kind}_{columns}_{'registers' if left_in_registers else 'panels'}"
    held = [f"%{sums + i}" for i in range(4)]
    values = {
        "name": name,
        "type": kind,
        "columns": columns,
        "left_type": "const unsigned*" if left_in_registers else "uint64_t",
        "sums": ", ".join(f"%{i}" for i in range(sums)),
        "outputs": ", ".join(f'"+f"(c[{i}])' for i in range(sums)),
        "left": f"{{{', '.join(held)}}}" if left_in_registers else held[0],
        "inputs": ", ".join(f'"r"(a[{i}])' for i in range(4)) if left_in_registers else '"l"(a)',
        "transposed": "1" if left_in_registers else "0, 0",
        "right": sums + (4 if left_in_registers else 1),
        "onto": sums + (5 if left_in_registers else 2),
    }
    return name, INSTRUCTION % values

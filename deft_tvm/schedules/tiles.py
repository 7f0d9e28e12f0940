"""Which tile classes a module gets: how many lane rows an item may hold, one kernel for each count.

One fixed tile is the costliest choice there is (PAT, ASPLOS 2026: 39 % lost), and every class costs
compile time. The operand is whatever the device multiplies fastest.
"""

from __future__ import annotations

from collections.abc import Set

from deft_tvm.dtypes import DTYPE_BYTES, Dtype
from deft_tvm.plan.residency import can_group, unit_bytes
from deft_tvm.spec import AttentionSpec, TileShape

CPU_KV_TILE = 64
CPU_MANY: dict[Dtype, tuple[int, ...]] = {
    "float32": (16, 32, 64, 128),
    "bfloat16": (16, 32, 48, 64, 128),
}
"""Lane rows of the classes with rows in the lanes. What an item leaves of a class is not computed,
in steps of 8 in float32; register tiles of bfloat16 want to be wider, so that 48 has a class."""
CPU_WITHOUT_ROPE = 48
"""A class for keys in one piece: with a rope beside them LLVM stores its register tiles at every
step, which halves the rate (AMD EPYC Zen 4, 2026-11-21)."""
CPU_FEW: dict[Dtype, tuple[int, ...]] = {"float32": (4, 8, 12), "bfloat16": (4, 8)}
"""Lane rows of the classes with the width in the lanes, beside that of one row. What an item leaves
of such a class is computed. MHA with 3 beams after 1,024 tokens takes 0.76 of its time with a class
of 4 in float32 and 0.95 in bfloat16; 10 rows over 4,096 tokens take 0.82 with one of 12 in float32,
where it is not among the many, and 0.97 in bfloat16 (AMD EPYC Zen 4, 2026-11-28)."""
CPU_SMALL_GROUP = 2
"""Of larger groups few rows fill 16 lanes: there 8 is all that stands between."""
CPU_FEW_BYTES = 16 << 10
"""With few rows a step is a copy out of memory, which half of the nearest cache shall hold. One
sequence of 65,536 takes 0.81 of its time with 64 KiB in float32, 0.96 in bfloat16 (AMD EPYC Zen 4,
2026-11-21)."""
CPU_ONE_TOKENS = 8
"""With one row a step is memory alone. Tokens of many heads lie in memory pages of their own, of
which K, V and both of the next step touch four times as many: beyond some 16 tokens more than the
nearest table of pages holds. 16 × 1,024 tokens of 32 heads take 0.80 of their time with 16 tokens
in float32, 0.85 in bfloat16 (AMD EPYC Zen 4, 2026-11-22)."""
CPU_STATE_BYTES = 64 << 10
"""Queries and outputs of the heads that a unit takes at a time lie in the second nearest cache."""
CUDA_KV_TILE = 64
CUDA_ROWS = (16, 32, 64)
CUDA_WIDE = 384
"""Queries and values wider than this together take half the tokens a step, to fit 99 KB of shared
memory, but in the smallest class, whose queries take little."""
GROUPED_ROWS = (16, 64)
"""Where four warps multiply 64 rows at once, that costs no more than 32 rows by themselves do: 32
sequences after a prompt of 4,000, MHA: 37 µs for 42 (NVIDIA H200, 2026-11-28)."""
GROUPED_BYTES = 160 << 10
"""Shared memory up to which such a step takes 64 tokens, though no second block fits beside: GLA-2
takes 0.82 to 0.88 of its time with 32 (64 drafts after 1,000; 32 sequences after 4,000)."""


def default_tiles(spec: AttentionSpec, kind: str, features: Set[str]) -> tuple[TileShape, ...]:
    """The tile classes for `spec` on a target of `kind`, by ascending lane rows.

    Args:
        spec: its group says how many lane rows one row takes; its dtype, what can be multiplied.
        kind: ``llvm`` or ``cuda``.
        features: instruction sets, as in `DeviceProfile.features`.
    """
    if kind == "cuda":
        operand = _one_dtype(spec)
        grouped = can_group(spec, operand, features)
        return tuple(
            TileShape(rows, _cuda_tokens(spec, rows, operand, grouped), operand)
            for rows in _cuda_rows(spec, operand, grouped)
        )
    few_operand = _few_operand(spec, features)
    between = CPU_FEW[few_operand] if spec.group <= CPU_SMALL_GROUP else (8,)
    few = [(rows, few_operand) for rows in (spec.group, *between) if spec.group <= rows < 16]
    operand = _cpu_operand(spec, features)
    classes = (rows for rows in CPU_MANY[operand] if spec.rope is None or rows != CPU_WITHOUT_ROPE)
    many = [(rows, operand) for rows in classes]
    fitting = [(rows, operand) for rows, operand in few + many if rows >= spec.group]
    wanted = dict(fitting or [(-(-spec.group // 16) * 16, operand)])
    return tuple(
        TileShape(rows, CPU_KV_TILE, wanted[rows])
        if rows >= 16
        else TileShape(
            rows, _few_tokens(spec, rows, wanted[rows]), wanted[rows], heads=_few_heads(spec, rows)
        )
        for rows in sorted(wanted)
    )


def _few_tokens(spec: AttentionSpec, lane_rows: int, operand: Dtype) -> int:
    """Tokens of a step with few rows: as many as `CPU_FEW_BYTES` hold, 16 to 64; of one row
    `CPU_ONE_TOKENS`."""
    if lane_rows == 1:
        return CPU_ONE_TOKENS
    width = spec.v_width + spec.rope_width + (0 if spec.tied else spec.k_width)
    fitting = max(1, CPU_FEW_BYTES // (width * DTYPE_BYTES[operand]))
    return max(16, min(CPU_KV_TILE, 1 << (fitting.bit_length() - 1)))


def _few_heads(spec: AttentionSpec, lane_rows: int) -> int:
    """Heads of a unit with few rows: all that lie side by side, as far as `CPU_STATE_BYTES` hold.

    One sequence of 65,536 takes 0.77 of its time with one head at a time for GTA, 0.88 for GQA in
    bfloat16 (AMD EPYC Zen 4, 2026-11-21).
    """
    if spec.layout == "HND":
        return 1
    state = 4 * lane_rows * (spec.q_width + spec.v_width)
    divisors = (n for n in range(1, spec.num_kv_heads + 1) if spec.num_kv_heads % n == 0)
    return max((n for n in divisors if n * state <= CPU_STATE_BYTES), default=1)


def _cpu_operand(spec: AttentionSpec, features: Set[str]) -> Dtype:
    """bfloat16 where the CPU multiplies pairs of it; all else is converted as a tile is loaded."""
    native = _one_dtype(spec) == "bfloat16" and "avx512bf16" in features and pairs_fit(spec)
    return "bfloat16" if native else "float32"


def pairs_fit(spec: AttentionSpec) -> bool:
    """Whether rows are multiplied two elements at a time: pairs, and V in vectors of sixteen."""
    return spec.k_width % 2 == 0 and spec.rope_width % 2 == 0 and spec.v_width % 16 == 0


def _few_operand(spec: AttentionSpec, features: Set[str]) -> Dtype:
    """bfloat16 where a token's key is whole vectors of pairs."""
    whole = spec.k_width % 32 == 0 and spec.rope_width % 32 == 0
    return _cpu_operand(spec, features) if whole else "float32"


def _cuda_rows(spec: AttentionSpec, operand: Dtype, grouped: bool) -> tuple[int, ...]:
    """16 lane rows are the fewest that tensor cores multiply; fewer are worth a class of their own
    only without them (64 sequences of 4,096, GQA-32/8: 1,470 µs with 4 rows of float32, 290 with 16
    of bfloat16; NVIDIA H200, 2026-11-27). Where values are wide, 32 rows leave no more room than 64
    do."""
    few = (spec.group,) if operand == "float32" and spec.group < 16 else ()
    possible = GROUPED_ROWS if grouped else CUDA_ROWS
    many = [r for r in possible if r >= spec.group and not (r == 32 and _is_wide(spec))]
    return (*few, *many) or (-(-spec.group // 16) * 16,)


def _cuda_tokens(spec: AttentionSpec, lane_rows: int, operand: Dtype, grouped: bool) -> int:
    whole = TileShape(lane_rows, CUDA_KV_TILE, operand)
    if grouped and unit_bytes(spec, whole, 2) <= GROUPED_BYTES:
        return CUDA_KV_TILE
    wide = _is_wide(spec) and lane_rows > CUDA_ROWS[0]
    return CUDA_KV_TILE // (2 if wide else 1)


def _is_wide(spec: AttentionSpec) -> bool:
    return spec.q_width + spec.v_width > CUDA_WIDE


def _one_dtype(spec: AttentionSpec) -> Dtype:
    """The type of the query and of all that is cached, float32 where they differ: it holds all.

    8-bit elements become any type exactly. But float16 is too narrow for probabilities times V's
    scale, where that is small.
    """
    dtypes = {spec.dtype, *(buffer.dtype for buffer in spec.buffers if not buffer.scaled)}
    narrow = spec.scaled and spec.dtype == "float16"
    return spec.dtype if len(dtypes) == 1 and not narrow else "float32"

"""Intel's AMX as LLVM functions: 16 × 16 tiles of float32 sums, 32 bfloat16 factors at a time.

A block of one or two tiles each way accumulates in tile registers 0 to 3 while registers 4 to 7
take its factors (Intel SDM, volume 1, chapter 18). `tile_intrinsics` says what each computes.
"""

from __future__ import annotations

from itertools import product

from deft_tvm.schedules.cpu.turns import exchanges

EDGE = 16
"""Rows of a tile, and float32 columns."""

DEPTH = 32
"""bfloat16 factors of a tile's row."""

_PALETTE = [1, 0] + 14 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [16] + 8 * [0]
_CONFIG = ", ".join(f"i8 {byte}" for byte in _PALETTE)

_DECLARED = f"""
@deft_tile_config = linkonce_odr hidden constant [64 x i8] [{_CONFIG}], align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.sttilecfg(ptr)
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)

define i32 @deft_enter_tiles(ptr %state) alwaysinline {{
  call void @llvm.x86.sttilecfg(ptr %state)
  call void @llvm.x86.ldtilecfg(ptr @deft_tile_config)
  ret i32 0
}}

define i32 @deft_leave_tiles(ptr %state) alwaysinline {{
  call void @llvm.x86.ldtilecfg(ptr %state)
  ret i32 0
}}
"""


def _functions(deep: int, rows: int) -> str:
    """LLVM of the three intrinsics for `deep` × `rows` tiles."""
    tiles = [(j, i, 2 * j + i) for j, i in product(range(deep), range(rows))]
    zeros = [f"call void @llvm.x86.tilezero(i8 {c})" for _, _, c in tiles]
    loads = _loads("a", 4, "%stride_a", deep, "mul i64 %stride_a, 16")
    loads += _loads("b", 6, "%stride_b", rows, "add i64 0, 64")
    products = [
        f"call void @llvm.x86.tdpbf16ps(i8 {c}, i8 {4 + j}, i8 {6 + i})" for j, i, c in tiles
    ]
    stores = ["%below = mul i64 %stride, 16"]
    for j, i, c in tiles:
        stores += [
            f"%down{c} = mul i64 %below, {j}",
            f"%at{c} = add i64 %down{c}, {64 * i}",
            f"%c{c} = getelementptr i8, ptr %c, i64 %at{c}",
            f"call void @llvm.x86.tilestored64(i8 {c}, ptr %c{c}, i64 %stride)",
        ]
    name = f"{deep}_{rows}"
    return (
        _function(f"deft_tile_zeros_{name}", "", zeros)
        + _function(
            f"deft_tile_products_{name}",
            "ptr %a, i64 %stride_a, ptr %b, i64 %stride_b",
            loads + products,
        )
        + _function(f"deft_tile_sums_{name}", "ptr %c, i64 %stride", stores)
    )


def _loads(factor: str, first: int, stride: str, tiles: int, step: str) -> list[str]:
    lines = [f"call void @llvm.x86.tileloadd64(i8 {first}, ptr %{factor}, i64 {stride})"]
    if tiles == 2:
        lines += [
            f"%step_{factor} = {step}",
            f"%next_{factor} = getelementptr i8, ptr %{factor}, i64 %step_{factor}",
            f"call void @llvm.x86.tileloadd64(i8 {first + 1}, ptr %next_{factor}, i64 {stride})",
        ]
    return lines


def _function(name: str, parameters: str, body: list[str]) -> str:
    lines = "\n  ".join([*body, "ret i32 0"])
    return f"\ndefine i32 @{name}({parameters}) alwaysinline {{\n  {lines}\n}}\n"


def _transpose() -> str:
    """32 rows of 16 sixteen-bit elements to 16 rows of 32.

    Two rows interleaved are 16 lanes of 32 bits, of which 16 such vectors are transposed.
    """
    pairs = ", ".join(f"i32 {i}, i32 {i + 16}" for i in range(16))
    body = ["%s0 = add i64 0, 0", *(f"%s{r} = add i64 %s{r - 1}, %stride_x" for r in range(1, 32))]
    for r in range(32):
        body += [
            f"%p{r} = getelementptr i8, ptr %x, i64 %s{r}",
            f"%r{r} = load <16 x i16>, ptr %p{r}, align 2",
        ]
    for n in range(16):
        body += [
            f"%m{n} = shufflevector <16 x i16> %r{2 * n}, <16 x i16> %r{2 * n + 1}, "
            f"<32 x i32> <{pairs}>",
            f"%v0_{n} = bitcast <32 x i16> %m{n} to <16 x i32>",
        ]
    body += exchanges(EDGE)
    body.append("%t0 = add i64 0, 0")
    body += [f"%t{n} = add i64 %t{n - 1}, %stride_o" for n in range(1, 16)]
    for n in range(16):
        body += [
            f"%o{n} = getelementptr i8, ptr %o, i64 %t{n}",
            f"store <16 x i32> %v4_{n}, ptr %o{n}, align 2",
        ]
    parameters = "ptr %o, i64 %stride_o, ptr %x, i64 %stride_x"
    return _function("deft_transpose", parameters, body)


AMX_LLVM = _DECLARED + "".join(_functions(*n) for n in product((1, 2), repeat=2)) + _transpose()

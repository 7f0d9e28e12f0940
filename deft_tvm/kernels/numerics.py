"""Number formats and exponentials of the kernels, as expressions that TVMScript takes in.

Exponents live in base 2: ``exp(x) = exp2(x · log₂e)``, and the factor is folded into the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial as bind

from tvm import tirx
from tvm.ir import Expr

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Minimax in relative error for 2^f on [-1/2, 1/2], highest degree first (Remez exchange).
# Degree 6 is right to 1.9e-9, so that float32 rounding (9.6e-8) is all that is left of it;
# degree 5, right to 7.5e-8, is plenty where probabilities are rounded to 16 bits.
EXP2_DEGREE_6 = (
    0.00015345812003834507,
    0.001339993121914494,
    0.009618488957108423,
    0.055503287769656434,
    0.24022646890634292,
    0.6931472057372673,
    1.0,
)
EXP2_DEGREE_5 = (
    0.0013276471979479397,
    0.009675541334216184,
    0.05550713273542589,
    0.24022119723848476,
    0.6931469670647331,
    1.0,
)

# Minimax in relative error for (tanh √z / √z - 1) / z on z <= 0.625², highest degree first; right
# to 4.4e-9 of tanh, where 1 - 2 / (exp(2x) + 1) would cancel.
TANH_DEGREE_4 = (
    -0.0057049783592677305,
    0.020639078726795268,
    -0.05373971215185753,
    0.13331442157467707,
    -0.3333328194017913,
)
TANH_SMALL = 0.625


FP8_BITS = "uint8"
"""Element type in which kernels take caches of `deft_tvm.dtypes.FP8`, so that no legalisation of
TVM's changes them."""


def storage(operand: str) -> str:
    """Element type in which a tile of `operand` is kept.

    bfloat16 tiles are kept as their bits: TVM's legalisation would turn a local bfloat16 buffer
    into a float32 one.
    """
    return "uint16" if operand == "bfloat16" else operand


def narrow(value: Expr, operand: str) -> Expr:
    """`value`, of any float type, rounded to `operand` and in its `storage` type.

    Bytes are taken for elements of `FP8_BITS`, which every operand holds exactly.
    """
    if str(value.ty) == FP8_BITS:
        value = _from_e4m3(value)
        if operand == "bfloat16":
            upper = tirx.shift_right(tirx.reinterpret("uint32", value), tirx.const(16, "uint32"))
            return tirx.Cast("uint16", upper)
    if operand != "bfloat16":
        return value.astype(operand)
    if str(value.ty) == "bfloat16":
        return tirx.reinterpret("uint16", value)
    return _bfloat16_bits(value.astype("float32"))


def widen(value: Expr, operand: str) -> Expr:
    """The float32 value of what `narrow` stored; exact."""
    if operand != "bfloat16":
        return value.astype("float32")
    bits = tirx.Cast("uint32", value)
    return tirx.reinterpret("float32", tirx.shift_left(bits, tirx.const(16, "uint32")))


def exp2_polynomial(x: Expr, operand: str) -> Expr:
    """2^x for x <= 0 in float32 without a library call, so that it vectorises.

    Exactly 0 below -126, and so for -inf: a masked score leaves nothing behind. NaN stays NaN.
    """
    # Rounds to even on LLVM, as `nearbyint` would. That one TVM does not vectorise, and of its loop
    # over scalars LLVM made a transpose with vectors of 8: 3 to 12 % of a kernel's time (AMD EPYC
    # Zen 1, 2026-11-28).
    whole = tirx.round(x)
    part = x - whole
    coefficients = EXP2_DEGREE_6 if operand == "float32" else EXP2_DEGREE_5
    power = _polynomial(coefficients, part)
    exponent = tirx.shift_left(tirx.Cast("int32", whole), tirx.const(23, "int32"))
    scaled = tirx.reinterpret("float32", tirx.reinterpret("int32", power) + exponent)
    return tirx.Select(x < tirx.const(-126.0, "float32"), tirx.const(0.0, "float32"), scaled)


def tanh(x: Expr, exp2: Callable[[Expr], Expr]) -> Expr:
    """tanh x in float32 without a library call; `exp2` is that of the target."""
    size = tirx.Select(x < tirx.const(0.0, "float32"), -x, x)
    square = x * x
    small = x + x * square * _polynomial(TANH_DEGREE_4, square)
    falling = exp2(size * tirx.const(-2 * LOG2_E, "float32"))
    one = tirx.const(1.0, "float32")
    large = (one - falling) / (one + falling)
    signed = tirx.Select(x < tirx.const(0.0, "float32"), -large, large)
    return tirx.Select(size < tirx.const(TANH_SMALL, "float32"), small, signed)


def base2_logit(
    score: Expr, scale: float, soft_cap: float | None, exp2: Callable[[Expr], Expr]
) -> Expr:
    """The scaled score, with the cap if there is one, times log₂e."""
    if soft_cap is None:
        return score * tirx.const(scale * LOG2_E, "float32")
    bounded = tanh(score * tirx.const(scale / soft_cap, "float32"), exp2)
    return bounded * tirx.const(soft_cap * LOG2_E, "float32")


def logits_of(
    scale: float, soft_cap: float | None, exp2: Callable[[Expr], Expr]
) -> tuple[Callable[[Expr], Expr], Callable[[Expr], Expr]]:
    """What makes a logit of a score, and what brings a logit to base 2.

    A maximum is the same before and after a factor. So without a cap the logit is the score itself,
    and its factor is met beside the subtraction of the maximum, where the two are one instruction:
    that saves a pass over the scores.
    """
    in_base_2 = bind(base2_logit, scale=scale, soft_cap=soft_cap, exp2=exp2)
    return (_same, in_base_2) if soft_cap is None else (in_base_2, _same)


def _same(x: Expr) -> Expr:
    return x


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Horner's rule, highest degree first."""
    value = tirx.const(coefficients[0], "float32")
    for coefficient in coefficients[1:]:
        value = value * x + tirx.const(coefficient, "float32")
    return value


def within(on_cpu: bool) -> tuple[Callable[..., Expr], Callable[[Expr, Expr], Expr]]:
    """What says whether ``begin <= i < end``, and whether two conditions hold.

    CUDA's compiler takes ``&&`` at its word and branches around what it may not need to read: a GPU
    gets one comparison instead, of what is non-negative, and looks at both conditions.
    """
    if on_cpu:
        return lambda begin, i, end: tirx.And(begin <= i, i < end), tirx.And
    return _within_in_one, _both


def _within_in_one(begin: Expr, i: Expr, end: Expr) -> Expr:
    size = tirx.max(end - begin, tirx.const(0, "int32"))
    return tirx.Cast("uint32", i - begin) < tirx.Cast("uint32", size)


def _both(one: Expr, other: Expr) -> Expr:
    if isinstance(other, tirx.IntImm):
        return one
    whole = tirx.bitwise_and(tirx.Cast("int32", one), tirx.Cast("int32", other))
    return whole != tirx.const(0, "int32")


LAZY = 8.0
"""In base 2: probabilities above a maximum that lags behind by so much are at most 256, which
float16 holds, too, and are rounded as finely."""


def lazy_max(maximum: Expr, found: Expr) -> Expr:
    """What a row's scores are taken relative to: `maximum` until one of a tile exceeds it by
    `LAZY`, so that the output need not be rescaled for each that is a little larger.

    Any number does that is not far below the largest score. Every row's first tile sets it.
    """
    return tirx.Select(found > maximum + tirx.const(LAZY, "float32"), found, maximum)


def finite(maximum: Expr) -> Expr:
    """0 for a row that has seen nothing yet, so that -inf minus -inf is never taken."""
    unseen = maximum == tirx.const(float("-inf"), "float32")
    return tirx.Select(unseen, tirx.const(0.0, "float32"), maximum)


def natural_lse(maximum: Expr, total: Expr) -> Expr:
    """Natural log-sum-exp of a base-2 maximum and the sum of exponentials above it."""
    natural = (maximum + tirx.log2(total)) * tirx.const(LN_2, "float32")
    nothing = total == tirx.const(0.0, "float32")
    return tirx.if_then_else(nothing, tirx.const(float("-inf"), "float32"), natural)


def _from_e4m3(byte: Expr) -> Expr:
    """The float32 value of an e4m3 byte, by way of the float16 whose exponent is 8 less.

    Conversion of float16 is an instruction that knows subnormal numbers, whatever the processor is
    told to do with those of float32. NaN, the largest magnitude, stays NaN.
    """
    bits = tirx.Cast("uint16", byte)
    sign = tirx.shift_left(
        tirx.bitwise_and(bits, tirx.const(0x80, "uint16")), tirx.const(8, "uint16")
    )
    size = tirx.bitwise_and(bits, tirx.const(0x7F, "uint16"))
    shifted = tirx.shift_left(size, tirx.const(7, "uint16"))
    nan = size == tirx.const(0x7F, "uint16")
    half = tirx.bitwise_or(sign, tirx.Select(nan, tirx.const(0x7E00, "uint16"), shifted))
    return tirx.reinterpret("float16", half).astype("float32") * tirx.const(256.0, "float32")


def _bfloat16_bits(value: Expr) -> Expr:
    """Round a float32 to nearest even in its upper half (NaN payloads may carry; NaN stays NaN)."""
    bits = tirx.reinterpret("uint32", value)
    odd = tirx.bitwise_and(
        tirx.shift_right(bits, tirx.const(16, "uint32")), tirx.const(1, "uint32")
    )
    rounded = bits + tirx.const(0x7FFF, "uint32") + odd
    return tirx.Cast("uint16", tirx.shift_right(rounded, tirx.const(16, "uint32")))

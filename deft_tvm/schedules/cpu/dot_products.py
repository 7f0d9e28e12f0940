"""Scalar products of a few rows with a few tokens, as many at a time as a vector has lanes.

Each product gathers in a vector of its own, whose lanes must be summed in the end. Of one vector
that takes a dozen instructions; of as many vectors as they have lanes, summed together as a
transpose would be, three each::

    [x0 x1 x2 x3] [y0 y1 y2 y3] …  →  [x0 x2 y0 y2] + [x1 x3 y1 y3]  →  …  →  [Σx Σy Σz Σw]
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import storage, widen
from deft_tvm.schedules.cpu.instructions import BFLOAT16_LLVM, LANES
from deft_tvm.schedules.verbs import power_of_two_in, register

LANES_OF_BLOCK = 4
"""Lanes of 128 bits, within which a shuffle is cheapest."""
VECTORS_OF_TRIP = 2
"""Of a row, at the most, where the width is a loop."""
LLVM_TYPES = {"float32": "float", "bfloat16": "bfloat", "float16": "half"}
STAYS_A_LOOP = """
!0 = distinct !{!0, !1}
!1 = !{!"llvm.loop.unroll.disable"}
"""
"""What `_loop` says of its loops: unrolled, they would be the one piece again."""


def lanes_of(width: int, operand: str, float_lanes: int) -> int:
    """Lanes that each product gathers in: what divides its width, bfloat16 in pairs."""
    if operand == "bfloat16":
        return power_of_two_in(width // 2, float_lanes)
    return power_of_two_in(width, float_lanes)


def tokens_of(lane_rows: int, lanes: int) -> int:
    """Tokens of a step, two or more, as near to its rows as they may be and rather fewer: both are
    loaded for all products, but rows are at hand."""
    squarish = min(1 << lanes.bit_length() // 2, lanes // 2)
    return lanes // power_of_two_in(lane_rows, squarish)


class Dots(NamedTuple):
    """The products of one function.

    Attributes:
        width: of each, in elements.
        operand: their type.
        rows, tokens: whose products they are.
        lanes: elements, or pairs of them, that are multiplied at a time.
        stored: element type of tokens of which the tile keeps addresses, see `references`;
            empty where it keeps elements.
        looped: the width is a loop, instead of one piece.
    """

    width: int
    operand: str
    rows: int
    tokens: int
    lanes: int
    stored: str
    looped: bool

    @property
    def step(self) -> int:
        """Elements of a vector."""
        return 2 * self.lanes if self.operand == "bfloat16" else self.lanes

    @property
    def trip(self) -> int:
        """Vectors of each row that one trip takes; all of them without a loop."""
        vectors = self.width // self.step
        return power_of_two_in(vectors, VECTORS_OF_TRIP) if self.looped else vectors

    @property
    def name(self) -> str:
        """Of the function."""
        where = f"_of_{self.stored}_in_place" if self.stored else ""
        sizes = f"{self.width}_{self.operand}_{self.rows}x{self.tokens}_by_{self.lanes}"
        return f"deft_dots_{sizes}{where}"


def dots_llvm(made: Dots) -> str:
    """The function ``made.name(c, a, b, c_row, a_row, b_row)``, with strides of rows.

    c[i, j] += Σ_d a[i, d] · b[j, d] for all rows i and tokens j.
    """
    steps = range(0, made.rows, made.lanes // made.tokens)
    lines = (line for first in steps for line in _step(made, first))
    body = "\n  ".join((*_rows(made), *lines))
    return f"""
define i32 @{made.name}(
  ptr %c, ptr %a, ptr %b, i64 %c_row, i64 %a_row, i64 %b_row) alwaysinline {{
  {body}
  ret i32 0
}}
"""


def _rows(made: Dots) -> Iterator[str]:
    """Where each row of both factors begins."""
    for name, count in (("a", made.rows), ("b", made.tokens)):
        referred = made.stored and name == "b"
        for r in range(count):
            row = f"%{name}{r}"
            yield f"{row}_offset = mul i64 %{name}_row, {r}"
            at = f"getelementptr {LLVM_TYPES[made.operand]}, ptr %{name}, i64 {row}_offset"
            if referred:
                yield f"{row}_kept = {at}"
                yield f"{row} = load ptr, ptr {row}_kept, align 2"
            else:
                yield f"{row} = {at}"


def _step(made: Dots, first: int) -> Iterator[str]:
    """Products of the rows from `first` on that fill one vector."""
    tokens, lanes = made.tokens, made.lanes
    rows = range(first, first + lanes // tokens)
    vector = f"<{lanes} x float>"
    if made.looped:
        yield from _loop(made, rows)
    else:
        yield from _trip(made, rows, "0", "zeroinitializer")
    sums = [f"%s{i}_{j}_{made.trip - 1}" for i, j in product(rows, range(tokens))]
    total = yield from _sum_each(sums, f"%t{first}", vector)
    part = f"<{tokens} x float>"
    for i in rows:
        yield f"%c{i}_row = mul i64 %c_row, {i}"
        yield f"%c{i} = getelementptr float, ptr %c, i64 %c{i}_row"
        lanes_of_row = range((i - first) * tokens, (i - first + 1) * tokens)
        yield f"%new{i} = {_shuffle(vector, total, 'poison', lanes_of_row)}"
        yield f"%old{i} = load {part}, ptr %c{i}, align 4"
        yield f"%sum{i} = fadd {part} %old{i}, %new{i}"
        yield f"store {part} %sum{i}, ptr %c{i}, align 4"


def _loop(made: Dots, rows: range) -> Iterator[str]:
    """Trips over the width, with a product in each register."""
    first, size, last = rows[0], made.step * made.trip, made.trip - 1
    yield f"br label %before{first}"
    yield f"before{first}:"
    yield f"br label %trip{first}"
    yield f"trip{first}:"
    entered = f"%before{first}"
    yield f"%d{first} = phi i64 [ 0, {entered} ], [ %d{first}_next, %trip{first} ]"
    for i, j in product(rows, range(made.tokens)):
        begun, gone_on = f"[ zeroinitializer, {entered} ]", f"[ %s{i}_{j}_{last}, %trip{first} ]"
        yield f"%s{i}_{j} = phi <{made.lanes} x float> {begun}, {gone_on}"
    yield from _trip(made, rows, f"%d{first}", None)
    yield f"%d{first}_next = add i64 %d{first}, {size}"
    yield f"%d{first}_on = icmp ult i64 %d{first}_next, {made.width}"
    yield f"br i1 %d{first}_on, label %trip{first}, label %after{first}, !llvm.loop !0"
    yield f"after{first}:"


def _trip(made: Dots, rows: range, begin: str, so_far: str | None) -> Iterator[str]:
    """Products over some vectors from element `begin` on, added to `so_far` or those until now."""
    first, step, lanes = rows[0], made.step, made.lanes
    tokens, vector, factor = range(made.tokens), f"<{lanes} x float>", LLVM_TYPES[made.operand]
    for n in range(made.trip):
        yield f"%at{first}_{n} = add i64 {begin}, {n * step}"
        factors = (("a", rows, made.operand), ("b", tokens, made.stored or made.operand))
        for name, numbers, kept in factors:
            for r in numbers:
                part = f"%{name}{first}_{r}_{n}"
                at = f"ptr %{name}{r}, i64 %at{first}_{n}"
                yield f"{part}_ptr = getelementptr {LLVM_TYPES[kept]}, {at}"
                yield from _load(part, step, kept, made.operand)
        for i, j in product(rows, tokens):
            before = f"%s{i}_{j}_{n - 1}" if n else so_far or f"%s{i}_{j}"
            a, b = (f"<{step} x {factor}> %{x}{first}_{r}_{n}" for x, r in (("a", i), ("b", j)))
            yield f"%s{i}_{j}_{n} = call {vector} " + (
                f"@llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}({vector} {before}, {a}, {b})"
                if made.operand == "bfloat16"
                else f"@llvm.fma.v{lanes}f32({a}, {b}, {vector} {before})"
            )


def _load(name: str, count: int, stored: str, operand: str) -> Iterator[str]:
    """So many elements at ``<name>_ptr``, from the type that is stored to that of the operand."""
    if stored == operand:
        yield f"{name} = load <{count} x {LLVM_TYPES[stored]}>, ptr {name}_ptr, align 2"
    elif stored == "bfloat16":  # the upper half of a float32
        yield f"{name}_bits = load <{count} x i16>, ptr {name}_ptr, align 2"
        yield f"{name}_low = zext <{count} x i16> {name}_bits to <{count} x i32>"
        halves = ", ".join(["i32 16"] * count)
        yield f"{name}_high = shl <{count} x i32> {name}_low, <{halves}>"
        yield f"{name} = bitcast <{count} x i32> {name}_high to <{count} x float>"
    else:
        kept = f"<{count} x {LLVM_TYPES[stored]}>"
        yield f"{name}_kept = load {kept}, ptr {name}_ptr, align 2"
        yield f"{name} = fpext {kept} {name}_kept to <{count} x float>"


def _sum_each(sums: Sequence[str], name: str, vector: str) -> Generator[str, None, str]:
    """Lines that make the vector of the sums over each vector's lanes; returns its name."""
    order = _order(len(sums))
    current = [sums[order.index(place)] for place in range(len(sums))]
    for level, (evens, odds) in enumerate(_levels(len(sums))):
        following = []
        for k in range(0, len(current), 2):
            made = f"{name}_{level}_{k // 2}"
            for part, taken in (("e", evens), ("o", odds)):
                yield f"{made}{part} = {_shuffle(vector, current[k], current[k + 1], taken)}"
            yield f"{made} = fadd {vector} {made}e, {made}o"
            following.append(made)
        current = following
    return current[0]


def _shuffle(vector: str, x: str, y: str, lanes: Sequence[int]) -> str:
    mask = ", ".join(f"i32 {lane}" for lane in lanes)
    return f"shufflevector {vector} {x}, {vector} {y}, <{len(lanes)} x i32> <{mask}>"


def declarations(operand: str, lanes: Sequence[int]) -> str:
    """What functions of `dots_llvm` call, once for a module."""
    vectors = ((n, f"<{n} x float>") for n in sorted(set(lanes)))
    if operand == "bfloat16":
        narrow = ((n, v, f"<{2 * n} x bfloat>") for n, v in vectors if n < LANES)
        return BFLOAT16_LLVM + "".join(
            f"declare {v} @llvm.x86.avx512bf16.dpbf16ps.{32 * n}({v}, {pairs}, {pairs})\n"
            for n, v, pairs in narrow
        )
    called = "".join(f"declare {v} @llvm.fma.v{n}f32({v}, {v}, {v})\n" for n, v in vectors)
    return called + STAYS_A_LOOP


def _levels(lanes: int) -> list[tuple[list[int], list[int]]]:
    """For each level of the sum, the lanes of two vectors laid end to end that are added.

    Every other block to the next, then a block's first half to its second, of two vectors in turns:
    neighbours of one vector added to each other would be ``vhaddps``, eight operations on AMD's
    first Zen.
    """
    block = min(LANES_OF_BLOCK, lanes)
    halvings = (lanes // block).bit_length() - 1
    levels = [(_every_other(lanes, block), block)] * halvings
    levels += [(_first_halves(lanes, block, unit), block // 2) for unit in (1, 2) if unit < block]
    return [(firsts, [lane + away for lane in firsts]) for firsts, away in levels]


def _every_other(lanes: int, block: int) -> list[int]:
    """Lanes of every other block, of the one vector and then of the other."""
    blocks = (x + n for x in (0, lanes) for n in range(0, lanes, 2 * block))
    return [first + lane for first in blocks for lane in range(block)]


def _first_halves(lanes: int, block: int, unit: int) -> list[int]:
    """Lanes of each block's first half, so many of the one vector and so many of the other."""
    units = (n + u for n in range(0, lanes, block) for u in range(0, block // 2, unit))
    return [x + first + lane for first in units for x in (0, lanes) for lane in range(unit)]


def _order(lanes: int) -> list[int]:
    """Which of the vectors that `_levels` begins with each lane of the last one is the sum of."""
    current = [[k] * lanes for k in range(lanes)]
    for evens, _ in _levels(lanes):
        pairs = (current[k] + current[k + 1] for k in range(0, len(current), 2))
        current = [[pair[lane] for lane in evens] for pair in pairs]
    return current[0]


@cache
def dots(made: Dots) -> str:
    """Intrinsic: scalar products of all rows with all tokens, added to float32."""
    width, operand, rows, tokens = made.width, made.operand, made.rows, made.tokens
    function, TILE = made.name, storage(operand)

    @script.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, width), TILE, offset_factor=1)
        B = T.match_buffer(b, (tokens, width), TILE, offset_factor=1)
        C = T.match_buffer(c, (rows, tokens), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:rows, 0:tokens], A[0:rows, 0:width], B[0:tokens, 0:width])
            T.writes(C[0:rows, 0:tokens])
            if rows == 1:  # a loop of one is left to the schedule
                for j, d in T.grid(tokens, width):
                    with T.sblock("product"):
                        vj, vd = T.axis.remap("SR", [j, d])
                        C[0, vj] = C[0, vj] + widen(A[0, vd], operand) * widen(B[vj, vd], operand)
            else:
                for i, j, d in T.grid(rows, tokens, width):
                    with T.sblock("product"):
                        vi, vj, vd = T.axis.remap("SSR", [i, j, d])
                        C[vi, vj] = C[vi, vj] + widen(A[vi, vd], operand) * widen(
                            B[vj, vd], operand
                        )

    @script.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        a_row, b_row, c_row = T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (rows, width), TILE, offset_factor=1, strides=[a_row, 1])
        B = T.match_buffer(b, (tokens, width), TILE, offset_factor=1, strides=[b_row, 1])
        C = T.match_buffer(c, (rows, tokens), "float32", offset_factor=1, strides=[c_row, 1])
        with T.sblock("root"):
            T.reads(C[0:rows, 0:tokens], A[0:rows, 0:width], B[0:tokens, 0:width])
            T.writes(C[0:rows, 0:tokens])
            T.evaluate(
                T.call_extern(
                    "int32",
                    function,
                    T.address_of(C[0, 0]),
                    T.address_of(A[0, 0]),
                    T.address_of(B[0, 0]),
                    T.int64(c_row),
                    T.int64(a_row),
                    T.int64(b_row),
                )
            )

    return register(function, description, implementation)

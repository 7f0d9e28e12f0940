"""The stages about a tile's tokens: where they lie, which rows see them, and their keys and values.

    seek        the run of each token
    locate      page, slot, position and the rows that see it
    find_tokens both, for a tile that begins anywhere in an item; find_each, with a search each
    find_next   the unit that comes after this one
    find_ahead  find_tokens for the next tile, which is that unit's beside the last one
    advance     what was located for the next tile becomes this tile's
    find_scales the scales of 8-bit keys and values
    find_cut    whether every row sees every token
    load        K, V or rope of the tile's tokens out of their pages
    ahead       the same of the next tile, asked of memory early

j is a token, d a column.
"""

from __future__ import annotations

from typing import Any

from tvm import DataType, tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import narrow
from deft_tvm.kernels.stage import stage
from deft_tvm.kernels.work import following, range_size
from deft_tvm.plan.columns import Item, Run
from deft_tvm.spec import TileShape

LINE_BYTES = 64
"""A cache line of x86 and of most AArch64; asking for shorter lines than there are does no harm."""


def next_run(runs: Any, run: Any, run_end: Any, step: Any, token: Any) -> Expr:
    """One step of the binary search: go 2^step runs on if those begin by `token`."""
    ahead = run + tirx.shift_left(tirx.const(1, "int32"), step)
    # The index is clamped since both sides of a select are read.
    begins = runs[tirx.min(ahead, run_end - 1), Run.OFFSET]
    return tirx.Select(tirx.And(ahead < run_end, begins <= token), ahead, run)


LOCATED_TOKENS = 256
"""Tokens that a GPU's block locates at a time, each by a thread or two: memory is waited for as
often as for one tile, but for several of them."""


def located_tiles(tile: TileShape) -> int:
    """Tiles whose tokens a GPU's block locates at a time."""
    return max(1, LOCATED_TOKENS // tile.kv_tile)


def halvings(count: Any) -> Expr:
    """How often `count` runs can be halved until one is left."""
    return tirx.Select(
        count > 1, tirx.const(32, "int32") - tirx.clz(count - 1), tirx.const(0, "int32")
    )


def in_window(own: Expr | None, position: Any, j: Any, window: int | None) -> Expr:
    """Whether token j is less than `window` positions before a row's own; true without one."""
    return tirx.const(True, "bool") if window is None else own - position[j] < window


def line_elements(cache: Any) -> int:
    """Elements of a cache line."""
    return LINE_BYTES * 8 // DataType(str(cache.dtype)).bits


def prefetch(element: Expr) -> Expr:
    """Ask for the cache line of `element` to be read into the second level."""
    READ, SECOND_LEVEL, DATA = 0, 2, 1
    return tirx.call_intrin(
        "void", "tirx.prefetch", tirx.address_of(element), READ, SECOND_LEVEL, DATA
    )


def nth_token(t0: Any, j: Any, tile: int, scatter: bool) -> Any:
    """Which token of the item is number `j` of the tile that begins at `t0`.

    With `scatter` no step is like the last: triangular numbers modulo a power of two are all
    numbers below it. In their own order a head's tokens lie a row of all heads apart, step after
    step, and a prefetcher that learns steps goes on where the tile ends: what it asked for in vain
    took a quarter of the read bandwidth (AMD EPYC Zen 4, 2026-11-28).
    """
    if not scatter or tile & (tile - 1):
        return t0 + j
    return t0 + T.bitwise_and(T.shift_right(j * (j + 1), 1), tile - 1)


def ends_in_run(runs: Any, run: Any, run_end: Any, last: Any) -> Expr:
    """Whether token `last` is still in `run`, in which an earlier one is."""
    following = run + 1
    begins = runs[tirx.min(following, run_end - 1), Run.OFFSET]
    return tirx.Or(following >= run_end, begins > last)


@stage
def find_tokens(
    page, slot, lane_begin, lane_end, position, windowed, first, runs, page_indices, page_shift,
    run_begin, run_end, search_steps, row_begin, group, t0, num_tokens, kv_tile, on_cpu,
):  # fmt: skip
    """Locate the tile that begins at `t0`, into entries from `first` of the tables.

    Most tiles lie in one run. `on_cpu` that is looked at first, since what a run says of all of a
    tile's tokens is read once then, where otherwise vectors gather it (6 % of a kernel's time with
    one row; AMD EPYC Zen 4, 2026-11-21), and tokens stand in the order of `nth_token`.
    """
    if on_cpu:
        run = T.sblock_alloc_buffer((1,), "int32")
        seek(run, runs, run_begin, run_end, search_steps, t0, num_tokens, False)
        if ends_in_run(runs, run[0], run_end, T.min(t0 + kv_tile, num_tokens) - 1):
            for _ in T.serial(1):
                with T.sblock("one_run"):
                    T.reads()
                    T.writes()
                    locate(
                        page, slot, lane_begin, lane_end, position, windowed, first, run, True,
                        runs, page_indices, page_shift, row_begin, group, t0, num_tokens, kv_tile,
                        True,
                    )  # fmt: skip
        else:
            for _ in T.serial(1):
                with T.sblock("several_runs"):
                    T.reads()
                    T.writes()
                    find_each(
                        page, slot, lane_begin, lane_end, position, windowed, first, runs,
                        page_indices, page_shift, run_begin, run_end, search_steps, row_begin,
                        group, t0, num_tokens, kv_tile, True,
                    )  # fmt: skip
    else:
        find_each(
            page, slot, lane_begin, lane_end, position, windowed, first, runs, page_indices,
            page_shift, run_begin, run_end, search_steps, row_begin, group, t0, num_tokens, kv_tile,
            False,
        )  # fmt: skip


@stage
def find_next(next_unit, work, units, threads):
    """Keep which unit's first tokens are asked of memory beside this one's last tile."""
    here: T.let[T.int32] = work
    # In two steps: TVM's analysis of the quotient within takes a tenth of a kernel's compile time.
    for i in range(1):
        with T.sblock("range_size"):
            vi = T.axis.spatial(1, i)
            next_unit[vi] = range_size(units, threads)
    for i in range(1):
        with T.sblock("find_next"):
            vi = T.axis.spatial(1, i)
            next_unit[vi] = following(here, units, next_unit[vi], threads)


@stage
def find_ahead(
    page, slot, lane_begin, lane_end, position, windowed, next_head, runs, page_indices, page_shift,
    items, item, head, next_unit, units, heads, search_steps, row_begin, group, t0, num_tokens,
    kv_tile,
):  # fmt: skip
    """Locate the tile after the one at `t0`, into the tables' second half, and its first head.

    After the item's last tile it is the first one of `next_unit`, which is only asked of memory.
    """
    goes_on: T.let[T.bool] = t0 + kv_tile < num_tokens
    of: T.let[T.int32] = T.Select(goes_on, item, next_unit[0] // units)
    # Kept: where they are used TVM would write all of it again, and compile three times as long.
    bounds = T.sblock_alloc_buffer((3,), "int32")
    for i in range(3):
        with T.sblock("bounds"):
            vi = T.axis.spatial(3, i)
            bounds[vi] = items[of, Item.RUN_BEGIN + vi]
    for i in range(1):
        with T.sblock("next_head"):
            vi = T.axis.spatial(1, i)
            next_head[vi] = T.Select(goes_on, head, next_unit[0] % units * heads)
    find_tokens(
        page, slot, lane_begin, lane_end, position, windowed, kv_tile, runs, page_indices,
        page_shift, bounds[0], bounds[1], search_steps, row_begin, group,
        T.Select(goes_on, t0 + kv_tile, 0), bounds[2], kv_tile, True,
    )  # fmt: skip


@stage
def find_each(
    page, slot, lane_begin, lane_end, position, windowed, first, runs, page_indices, page_shift,
    run_begin, run_end, search_steps, row_begin, group, t0, num_tokens, kv_tile, scatter,
):  # fmt: skip
    """The same with a search for each token."""
    run_of = T.sblock_alloc_buffer((kv_tile,), "int32")
    seek(run_of, runs, run_begin, run_end, search_steps, t0, num_tokens, scatter)
    locate(
        page, slot, lane_begin, lane_end, position, windowed, first, run_of, False, runs,
        page_indices, page_shift, row_begin, group, t0, num_tokens, kv_tile, scatter,
    )  # fmt: skip


@stage
def seek(run_of, runs, run_begin, run_end, search_steps, t0, num_tokens, scatter):
    """The run of each token from `t0` on, by binary search over the runs' offsets.

    Tokens past the item's last are taken for its last, so that nothing outside is ever read.
    """
    for j, s in T.grid(run_of.shape[0], search_steps + 1):
        with T.sblock("seek"):
            vj, vs = T.axis.remap("SR", [j, s])
            with T.init():
                run_of[vj] = run_begin
            run_of[vj] = next_run(
                runs,
                run_of[vj],
                run_end,
                search_steps - vs,
                T.min(nth_token(t0, vj, run_of.shape[0], scatter), num_tokens - 1),
            )


@stage
def locate(
    page, slot, lane_begin, lane_end, position, windowed, first, run_of, one_run, runs,
    page_indices, page_shift, row_begin, group, t0, num_tokens, kv_tile, scatter,
):  # fmt: skip
    """Where each token lies, and the interval of lane rows that see it; none past the last.

    Its path position too, where there is a window.

    The tables are written from entry `first`.
    """
    for j in range(kv_tile):
        with T.sblock("locate"):
            vj = T.axis.spatial(kv_tile, j)
            run: T.let[T.int32] = run_of[0 if one_run else vj]
            t: T.let[T.int32] = (
                T.min(nth_token(t0, vj, kv_tile, scatter), num_tokens - 1) - runs[run, Run.OFFSET]
            )
            x: T.let[T.int32] = runs[run, Run.FIRST_SLOT] + t
            page[first + vj] = page_indices[
                runs[run, Run.PAGE_BEGIN] + T.shift_right(x, page_shift)
            ]
            slot[first + vj] = T.bitwise_and(x, T.shift_left(1, page_shift) - 1)
            lane_begin[first + vj] = (
                runs[run, Run.ROW_BEGIN] + T.max(0, t - runs[run, Run.DIAGONAL]) - row_begin
            ) * group
            lane_end[first + vj] = T.Select(
                nth_token(t0, vj, kv_tile, scatter) < num_tokens,
                (runs[run, Run.ROW_END] - row_begin) * group,
                0,
            )
            if windowed:
                position[first + vj] = runs[run, Run.POSITION] + t


@stage
def advance(page, slot, lane_begin, lane_end, position, windowed, kv_tile):
    """The next tile becomes this one."""
    for j in range(kv_tile):
        with T.sblock("advance"):
            vj = T.axis.spatial(kv_tile, j)
            page[vj] = page[kv_tile + vj]
            slot[vj] = slot[kv_tile + vj]
            lane_begin[vj] = lane_begin[kv_tile + vj]
            lane_end[vj] = lane_end[kv_tile + vj]
            if windowed:
                position[vj] = position[kv_tile + vj]


@stage
def find_scales(k_scale, v_scale, k_scales, v_scales, page, begin, head, kv_tile):
    """By what K's and V's stored elements are multiplied."""
    for j in range(kv_tile):
        with T.sblock("find_scales"):
            vj = T.axis.spatial(kv_tile, j)
            k_scale[vj] = k_scales[page[begin + vj], head]
            v_scale[vj] = v_scales[page[begin + vj], head]


@stage
def find_cut(cut, lane_begin, lane_end, position, begin, lanes, last_position, window, kv_tile):
    """How many tokens of the tile, from entry `begin` of the tables, some row does not see."""
    for j in range(kv_tile):
        with T.sblock("find_cut"):
            vj = T.axis.reduce(kv_tile, j)
            with T.init():
                cut[0] = 0
            cut[0] = cut[0] + T.Select(
                T.And(
                    T.And(lane_begin[begin + vj] <= 0, lanes <= lane_end[begin + vj]),
                    in_window(last_position, position, begin + vj, window),
                ),
                0,
                1,
            )


@stage
def load(tile, cache, at, page, slot, begin, head, first, operand, block):
    """Columns from `first` of each token of the tile, from entry `begin` of the tables."""
    for j, d in T.grid(tile.shape[0], tile.shape[1]):
        with T.sblock(block):
            vj, vd = T.axis.remap("SS", [j, d])
            tile[vj, vd] = narrow(
                at(cache, page[begin + vj], slot[begin + vj], head, first + vd), operand
            )


@stage
def ahead(cache, at, page, slot, head, first, width, kv_tile, block):
    """Ask memory for columns from `first` of the next tile's tokens, line by line.

    Pages scatter a head's tokens, so that no hardware prefetcher foresees the next one; asked for
    between this tile's products, they arrive beside the arithmetic.
    """
    for j, n in T.grid(kv_tile, -(-width // line_elements(cache))):
        with T.sblock(block):
            vj, vn = T.axis.remap("SS", [j, n])
            T.reads(page[kv_tile + vj], slot[kv_tile + vj])
            T.writes()
            T.evaluate(
                prefetch(
                    at(
                        cache,
                        page[kv_tile + vj],
                        slot[kv_tile + vj],
                        head,
                        first + vn * line_elements(cache),
                    )
                )
            )

"""The stages of the partial kernel: pieces of TensorIR that `partial` puts in their place.

    enter, leave  around a unit of work
    gather      query rows of the item, permuted and folded, into a tile
    locate      page, slot and the rows that see it, for each token of the tile
    advance     what was located for the next tile becomes this tile's
    load        K, V or rope of the tile's tokens out of their pages
    ahead       the same of the next tile, asked of memory early
    product     scores of all rows and tokens
    logits      scores scaled to base 2; -inf where the row does not see the token
    softmax     online: new maximum, probabilities, sums, and the factor that rescales the past
    weigh       probabilities times V, folded into the rescaled output
    keep        the new state becomes the state
    write       normalised output and LSE, to a partial slot or straight to the caller's row

Tiles are [M rows, N tokens, width]; i is a row, j a token, d a column. `operand` is the type in
which the products' factors are kept (see `numerics.storage`). Blocks are named by what they
compute: schedules address them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tvm import DataType, tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import finite, narrow, natural_lse, storage, widen

LINE_BYTES = 64
"""A cache line of x86 and of most AArch64; asking for shorter lines than there are does no harm."""


UNIT_STATE_BYTES = 64
"""State of the processor that a schedule may keep for as long as a unit of work."""


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """TensorIR that is parsed where it is called.

    ``T.inline`` counts its calls and numbers block names by them, over all kernels of the process;
    a fresh one for each call keeps the names.
    """

    @wraps(function)
    def placed(*args: Any) -> None:
        return T.inline(function)(*args)

    return placed


def next_run(runs: Any, run: Any, run_end: Any, step: Any, token: Any) -> Expr:
    """One step of the binary search: go 2^step runs on if those begin by `token`."""
    ahead = run + tirx.shift_left(tirx.const(1, "int32"), step)
    # The index is clamped since both sides of a select are read.
    begins = runs[tirx.min(ahead, run_end - 1), 0]
    return tirx.Select(tirx.And(ahead < run_end, begins <= token), ahead, run)


def position_of(
    row_positions: Any, row_begin: Any, i: Any, lanes: Any, group: int, window: int | None
) -> Expr | None:
    """Path position of a lane row; of its item's last past the end."""
    if window is None:
        return None
    return row_positions[row_begin + tirx.min(i, lanes - 1) // group]


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


def score(S: Any, S_rope: Any, i: Any, j: Any, roped: bool) -> Expr:
    return S[i, j] + S_rope[i, j] if roped else S[i, j]


@stage
def enter(state):
    """Where a schedule may put what the processor needs before a unit of work."""
    for n in range(UNIT_STATE_BYTES):
        with T.sblock("enter"):
            vn = T.axis.spatial(UNIT_STATE_BYTES, n)
            state[vn] = T.uint8(0)


@stage
def leave(state):
    """Where it may undo that."""
    for n in range(UNIT_STATE_BYTES):
        with T.sblock("leave"):
            vn = T.axis.spatial(UNIT_STATE_BYTES, n)
            state[vn] = state[vn] + T.uint8(1)


@stage
def gather(Q, q, row_order, row_begin, lanes, head, group, first, operand, block):
    """Columns from `first` of the item's query rows; zeros past its last row."""
    for i, d in T.grid(Q.shape[0], Q.shape[1]):
        with T.sblock(block):
            vi, vd = T.axis.remap("SS", [i, d])
            row: T.let[T.int32] = row_order[row_begin + T.min(vi, lanes - 1) // group]
            Q[vi, vd] = T.Select(
                vi < lanes,
                narrow(q[row, head * group + vi % group, first + vd], operand),
                T.Cast(storage(operand), 0),
            )


@stage
def fill(buffer, value, block):
    """One value in every row of a vector."""
    for i in range(buffer.shape[0]):
        with T.sblock(block):
            vi = T.axis.spatial(buffer.shape[0], i)
            buffer[vi] = T.float32(value)


@stage
def seek(run_of, runs, run_begin, run_end, search_steps, t0, num_tokens):
    """The run of each token, by binary search over the runs' offsets.

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
                T.min(t0 + vj, num_tokens - 1),
            )


@stage
def locate(
    page, slot, lane_begin, lane_end, position, windowed, first, run_of, runs, page_indices,
    page_shift, row_begin, group, t0, num_tokens,
):  # fmt: skip
    """Where each token lies, and the interval of lane rows that see it; none past the last.

    Its path position too, where there is a window.

    The tables are written from entry `first`.
    """
    for j in range(run_of.shape[0]):
        with T.sblock("locate"):
            vj = T.axis.spatial(run_of.shape[0], j)
            run: T.let[T.int32] = run_of[vj]
            t: T.let[T.int32] = T.min(t0 + vj, num_tokens - 1) - runs[run, 0]
            x: T.let[T.int32] = runs[run, 2] + t
            page[first + vj] = page_indices[runs[run, 1] + T.shift_right(x, page_shift)]
            slot[first + vj] = T.bitwise_and(x, T.shift_left(1, page_shift) - 1)
            lane_begin[first + vj] = (runs[run, 3] + T.max(0, t - runs[run, 5]) - row_begin) * group
            lane_end[first + vj] = T.Select(
                t0 + vj < num_tokens, (runs[run, 4] - row_begin) * group, 0
            )
            if windowed:
                position[first + vj] = runs[run, 6] + t


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
def find_cut(cut, lane_begin, lane_end, position, lanes, last_position, window, kv_tile):
    """How many tokens of the tile some row of the item does not see."""
    for j in range(kv_tile):
        with T.sblock("find_cut"):
            vj = T.axis.reduce(kv_tile, j)
            with T.init():
                cut[0] = 0
            cut[0] = cut[0] + T.Select(
                T.And(
                    T.And(lane_begin[vj] <= 0, lanes <= lane_end[vj]),
                    in_window(last_position, position, vj, window),
                ),
                0,
                1,
            )


@stage
def load(tile, cache, at, page, slot, head, first, operand, block):
    """Columns from `first` of each token of the tile."""
    for j, d in T.grid(tile.shape[0], tile.shape[1]):
        with T.sblock(block):
            vj, vd = T.axis.remap("SS", [j, d])
            tile[vj, vd] = narrow(at(cache, page[vj], slot[vj], head, first + vd), operand)


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


@stage
def product(S, Q, K, first, operand, block):
    """S[i, j] = Q[i] · K[j, first:]."""
    for i, j, d in T.grid(Q.shape[0], K.shape[0], Q.shape[1]):
        with T.sblock(block):
            vi, vj, vd = T.axis.remap("SSR", [i, j, d])
            with T.init():
                S[vi, vj] = T.float32(0)
            S[vi, vj] = S[vi, vj] + widen(Q[vi, vd], operand) * widen(K[vj, first + vd], operand)


@stage
def whole_logits(X, S, S_rope, roped, logit):
    """Every row sees every token."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("logits"):
            vi, vj = T.axis.remap("SS", [i, j])
            X[vi, vj] = logit(score(S, S_rope, vi, vj, roped))


@stage
def masked_logits(
    X, S, S_rope, roped, logit, lane_begin, lane_end, position, row_positions, row_begin, lanes,
    group, window,
):  # fmt: skip
    """A row sees the tokens whose interval holds it, up to so far before its own position."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("masked_logits"):
            vi, vj = T.axis.remap("SS", [i, j])
            X[vi, vj] = T.Select(
                T.And(
                    T.And(lane_begin[vj] <= vi, vi < lane_end[vj]),
                    in_window(
                        position_of(row_positions, row_begin, vi, lanes, group, window),
                        position,
                        vj,
                        window,
                    ),
                ),
                logit(score(S, S_rope, vi, vj, roped)),
                T.float32("-inf"),
            )


@stage
def grow_max(m_new, factor, m_tile, m, X, exp2):
    """The running maximum with this tile, and 2^(old - new)."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("row_max"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                # Not -inf: a reduction over threads must begin with TVM's own identity of max.
                m_tile[vi] = T.min_value("float32")
            m_tile[vi] = T.max(m_tile[vi], X[vi, vj])
    for i in range(X.shape[0]):
        with T.sblock("new_max"):
            vi = T.axis.spatial(X.shape[0], i)
            m_new[vi] = T.max(m[vi], m_tile[vi])
    for i in range(X.shape[0]):
        with T.sblock("rescale"):
            vi = T.axis.spatial(X.shape[0], i)
            factor[vi] = exp2(m[vi] - finite(m_new[vi]))


@stage
def exponentiate(P, E, total_new, total_tile, total, factor, X, m_new, exp2, operand):
    """Probabilities relative to the new maximum, rounded only after they were summed."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("exponentials"):
            vi, vj = T.axis.remap("SS", [i, j])
            E[vi, vj] = exp2(X[vi, vj] - finite(m_new[vi]))
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("row_sum"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                total_tile[vi] = T.float32(0)
            total_tile[vi] = total_tile[vi] + E[vi, vj]
    for i in range(X.shape[0]):
        with T.sblock("new_sum"):
            vi = T.axis.spatial(X.shape[0], i)
            total_new[vi] = total[vi] * factor[vi] + total_tile[vi]
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("probabilities"):
            vi, vj = T.axis.remap("SS", [i, j])
            P[vi, vj] = narrow(E[vi, vj], operand)


@stage
def weigh(A_new, U, A, factor, P, V, operand):
    """A_new[i] = A[i] · factor[i] + Σ_j P[i, j] V[j]."""
    for i, d, j in T.grid(P.shape[0], V.shape[1], V.shape[0]):
        with T.sblock("accumulate"):
            vi, vd, vj = T.axis.remap("SSR", [i, d, j])
            with T.init():
                U[vi, vd] = T.float32(0)
            U[vi, vd] = U[vi, vd] + widen(P[vi, vj], operand) * widen(V[vj, vd], operand)
    for i, d in T.grid(A.shape[0], A.shape[1]):
        with T.sblock("fold"):
            vi, vd = T.axis.remap("SS", [i, d])
            A_new[vi, vd] = A[vi, vd] * factor[vi] + U[vi, vd]


@stage
def keep(A, A_new, m, m_new, total, total_new):
    """The new state becomes the state."""
    for i, d in T.grid(A.shape[0], A.shape[1]):
        with T.sblock("keep_out"):
            vi, vd = T.axis.remap("SS", [i, d])
            A[vi, vd] = A_new[vi, vd]
    for i in range(m.shape[0]):
        with T.sblock("keep_max"):
            vi = T.axis.spatial(m.shape[0], i)
            m[vi] = m_new[vi]
    for i in range(m.shape[0]):
        with T.sblock("keep_sum"):
            vi = T.axis.spatial(m.shape[0], i)
            total[vi] = total_new[vi]


@stage
def write(
    out, lse, partial_out, partial_lse, inverse, A, m, total,
    dests, dest_begin, lanes, head, group, dtype,
):  # fmt: skip
    """Normalise, and store where the plan says: a partial slot, or ~row of the caller."""
    for i in range(m.shape[0]):
        with T.sblock("normalise"):
            vi = T.axis.spatial(m.shape[0], i)
            inverse[vi] = T.if_then_else(
                total[vi] == T.float32(0), T.float32(0), T.float32(1) / total[vi]
            )
    for i, d in T.grid(A.shape[0], A.shape[1]):
        with T.sblock("write_out"):
            vi, vd = T.axis.remap("SS", [i, d])
            if vi < lanes:
                dest: T.let[T.int32] = dests[dest_begin + vi // group]
                if dest >= 0:
                    partial_out[dest, head * group + vi % group, vd] = A[vi, vd] * inverse[vi]
                else:
                    out[-1 - dest, head * group + vi % group, vd] = T.Cast(
                        dtype, A[vi, vd] * inverse[vi]
                    )
    for i in range(m.shape[0]):
        with T.sblock("write_lse"):
            vi = T.axis.spatial(m.shape[0], i)
            if vi < lanes:
                dest: T.let[T.int32] = dests[dest_begin + vi // group]
                if dest >= 0:
                    partial_lse[dest, head * group + vi % group] = natural_lse(m[vi], total[vi])
                else:
                    lse[-1 - dest, head * group + vi % group] = natural_lse(m[vi], total[vi])

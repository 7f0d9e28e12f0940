"""The stages of the partial kernel about its rows, in their order.

    enter       what a schedule puts before a unit of work; leave, after it
    find_dest   where each row's result goes
    gather      query rows of the item, permuted and folded, into a tile
    fill        the state of rows that have seen nothing; begin_with_sink, but their sinks
    product     scores of all rows and tokens
    whole_logits, masked_logits
                scores, under a cap if there is one; -inf where the row does not see the token
    grow_max    online softmax: the new maximum, and the factor that rescales the past
    exponentiate, grow_sum, round_weights
                probabilities, their sum, and what V is weighed by
    weigh       probabilities times V, folded into the rescaled output; weigh_on, summed onto it
    keep        the new state becomes the state
    write       normalised output and LSE, to a partial slot or straight to the caller's row

`tokens` has those about a tile's tokens. Tiles are [M rows, N tokens, width]; i is a row, j a
token, d a column. `operand` is the type in which the products' factors are kept (see
`numerics.storage`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import LOG2_E, finite, narrow, natural_lse, storage, widen
from deft_tvm.kernels.stage import stage
from deft_tvm.kernels.tokens import in_window

UNIT_STATE_BYTES = 64
"""State of the processor that a schedule may keep for as long as a unit of work."""

SUCCESSORS = (("X", "S"), ("E", "X"), ("W", "E"), ("P", "W"), ("P", "E"), ("A_new", "A"))
"""Buffers each of which is made element by element of another that is not read again: logits of
scores, exponentials of logits, weights of exponentials, what is rounded of either, and the new
output of the old. All but the last names that of an earlier pair."""


def position_of(
    row_positions: Any, row_begin: Any, i: Any, lanes: Any, group: int, window: int | None
) -> Expr | None:
    """Path position of a lane row; of its item's last past the end."""
    if window is None:
        return None
    return row_positions[row_begin + tirx.min(i, lanes - 1) // group]


def lane_of(i: Any, rows: int, lane_rows: int) -> Any:
    """Lane row of state row i; there are `rows` of them, `lane_rows` for each head of a unit."""
    return i if rows == lane_rows else i % lane_rows


def q_head(i: Any, rows: int, lane_rows: int, head: Any, group: int) -> Any:
    """Query head of state row i, where `head` is the unit's first KV head."""
    if rows == lane_rows:
        return head * group + i % group
    return (head + i // lane_rows) * group + i % lane_rows % group


def score(S: Any, S_rope: Any, k_scale: Any, i: Any, j: Any, roped: bool, scaled: bool) -> Expr:
    """q · k: the product with K's stored elements times their scale, and that with the rope."""
    product = S[i, j] * k_scale[j] if scaled else S[i, j]
    return product + S_rope[i, j] if roped else product


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
def gather(
    Q, q, row_order, row_begin, lanes, lane_rows, head, group, first, operand, zeros, block
):  # fmt: skip
    """Columns from `first` of the item's query rows, head after head.

    Past its last row there are zeros; or without `zeros` that row's again, so that whole vectors of
    it can be copied. Nothing is written of what comes of these.
    """
    for i, d in T.grid(Q.shape[0], Q.shape[1]):
        with T.sblock(block):
            vi, vd = T.axis.remap("SS", [i, d])
            lane: T.let[T.int32] = lane_of(vi, Q.shape[0], lane_rows)
            row: T.let[T.int32] = row_order[row_begin + T.min(lane, lanes - 1) // group]
            if zeros:
                Q[vi, vd] = T.Select(
                    lane < lanes,
                    narrow(
                        q[row, q_head(vi, Q.shape[0], lane_rows, head, group), first + vd], operand
                    ),
                    T.Cast(storage(operand), 0),
                )
            else:
                Q[vi, vd] = narrow(
                    q[row, q_head(vi, Q.shape[0], lane_rows, head, group), first + vd], operand
                )


@stage
def fill(buffer, value, block):
    """One value in every row of a vector."""
    for i in range(buffer.shape[0]):
        with T.sblock(block):
            vi = T.axis.spatial(buffer.shape[0], i)
            buffer[vi] = T.float32(value)


@stage
def begin_with_sink(m, total, sinks, dests, dest_begin, lanes, lane_rows, head, group):
    """The state of a row that this item alone answers for: one token was seen, which is its sink
    and has no value. Other rows have seen nothing, and meet their sink in stage 2."""
    for i in range(m.shape[0]):
        with T.sblock("init_max"):
            vi = T.axis.spatial(m.shape[0], i)
            lane: T.let[T.int32] = lane_of(vi, m.shape[0], lane_rows)
            m[vi] = T.Select(
                dests[dest_begin + T.min(lane, lanes - 1) // group] < 0,
                sinks[q_head(vi, m.shape[0], lane_rows, head, group)] * T.float32(LOG2_E),
                T.float32("-inf"),
            )
    for i in range(m.shape[0]):
        with T.sblock("init_sum"):
            vi = T.axis.spatial(m.shape[0], i)
            total[vi] = T.Select(m[vi] == T.float32("-inf"), T.float32(0), T.float32(1))


@stage
def find_dest(dest, dests, dest_begin, lanes, group):
    """Where each row goes, asked for long before it does: at the end nothing else hides the wait.
    A CPU reads it then."""
    for i in range(dest.shape[0]):
        with T.sblock("find_dest"):
            vi = T.axis.spatial(dest.shape[0], i)
            dest[vi] = dests[dest_begin + T.min(vi, lanes - 1) // group]


@stage
def product(S, Q, base, K, first, operand, block):
    """S[i, j] = Q[base + i] · K[j, first:]."""
    for i, j, d in T.grid(S.shape[0], K.shape[0], Q.shape[1]):
        with T.sblock(block):
            vi, vj, vd = T.axis.remap("SSR", [i, j, d])
            with T.init():
                S[vi, vj] = T.float32(0)
            S[vi, vj] = S[vi, vj] + widen(Q[base + vi, vd], operand) * widen(
                K[vj, first + vd], operand
            )


@stage
def whole_logits(X, S, S_rope, roped, k_scale, scaled, logit):
    """Every row sees every token."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("logits"):
            vi, vj = T.axis.remap("SS", [i, j])
            X[vi, vj] = logit(score(S, S_rope, k_scale, vi, vj, roped, scaled))


@stage
def masked_logits(
    X, S, S_rope, roped, k_scale, scaled, logit, lane_begin, lane_end, position, begin,
    row_positions, row_begin, lanes, group, window, within, both,
):  # fmt: skip
    """A row sees the tokens whose interval holds it, up to so far before its own position.

    The tile's entries in the tables are those from `begin`.
    """
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("masked_logits"):
            vi, vj = T.axis.remap("SS", [i, j])
            X[vi, vj] = T.Select(
                both(
                    within(lane_begin[begin + vj], vi, lane_end[begin + vj]),
                    in_window(
                        position_of(row_positions, row_begin, vi, lanes, group, window),
                        position,
                        begin + vj,
                        window,
                    ),
                ),
                logit(score(S, S_rope, k_scale, vi, vj, roped, scaled)),
                T.float32("-inf"),
            )


@stage
def grow_max(m_new, factor, m, base, X, grown, in_base_2, exp2):
    """The running maximum with this tile as far as it is `grown`, and 2^(old - new)."""
    m_tile = T.sblock_alloc_buffer((X.shape[0],), "float32")
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
            m_new[vi] = grown(m[base + vi], in_base_2(m_tile[vi]))
    for i in range(X.shape[0]):
        with T.sblock("rescale"):
            vi = T.axis.spatial(X.shape[0], i)
            factor[vi] = exp2(m[base + vi] - finite(m_new[vi]))


@stage
def exponentiate(E, X, m_new, in_base_2, exp2):
    """Probabilities relative to the new maximum."""
    for i, j in T.grid(X.shape[0], X.shape[1]):
        with T.sblock("exponentials"):
            vi, vj = T.axis.remap("SS", [i, j])
            E[vi, vj] = exp2(in_base_2(X[vi, vj]) - finite(m_new[vi]))


@stage
def grow_sum(total_new, total, base, factor, E):
    """The running sum with this tile, of probabilities that are not rounded."""
    total_tile = T.sblock_alloc_buffer((E.shape[0],), "float32")
    for i, j in T.grid(E.shape[0], E.shape[1]):
        with T.sblock("row_sum"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                total_tile[vi] = T.float32(0)
            total_tile[vi] = total_tile[vi] + E[vi, vj]
    for i in range(E.shape[0]):
        with T.sblock("new_sum"):
            vi = T.axis.spatial(E.shape[0], i)
            total_new[vi] = total[base + vi] * factor[vi] + total_tile[vi]


@stage
def round_weights(P, W, E, v_scale, scaled, operand):
    """By what V's stored elements are weighed, rounded: a probability, times V's scale if any.

    On a GPU that comes before the sums: warps may tell each other both in one go.
    """
    if scaled:
        for i, j in T.grid(E.shape[0], E.shape[1]):
            with T.sblock("weights"):
                vi, vj = T.axis.remap("SS", [i, j])
                W[vi, vj] = E[vi, vj] * v_scale[vj]
    for i, j in T.grid(E.shape[0], E.shape[1]):
        with T.sblock("probabilities"):
            vi, vj = T.axis.remap("SS", [i, j])
            P[vi, vj] = narrow(W[vi, vj] if scaled else E[vi, vj], operand)


@stage
def weigh(A_new, U, A, base, factor, P, V, operand):
    """A_new[i] = A[base + i] · factor[i] + Σ_j P[i, j] V[j]."""
    for i, d, j in T.grid(P.shape[0], V.shape[1], V.shape[0]):
        with T.sblock("accumulate"):
            vi, vd, vj = T.axis.remap("SSR", [i, d, j])
            with T.init():
                U[vi, vd] = T.float32(0)
            U[vi, vd] = U[vi, vd] + widen(P[vi, vj], operand) * widen(V[vj, vd], operand)
    for i, d in T.grid(A_new.shape[0], A_new.shape[1]):
        with T.sblock("fold"):
            vi, vd = T.axis.remap("SS", [i, d])
            A_new[vi, vd] = A[base + vi, vd] * factor[vi] + U[vi, vd]


@stage
def weigh_on(A_new, A, base, factor, P, V, operand):
    """The same, summed onto the rescaled output: on tensor cores no other sums are kept."""
    for i, d, j in T.grid(P.shape[0], V.shape[1], V.shape[0]):
        with T.sblock("accumulate"):
            vi, vd, vj = T.axis.remap("SSR", [i, d, j])
            with T.init():
                A_new[vi, vd] = A[base + vi, vd] * factor[vi]
            A_new[vi, vd] = A_new[vi, vd] + widen(P[vi, vj], operand) * widen(V[vj, vd], operand)


@stage
def keep(A, A_new, m, m_new, total, total_new, base):
    """The new state becomes the state of the rows from `base` on."""
    for i, d in T.grid(A_new.shape[0], A_new.shape[1]):
        with T.sblock("keep_out"):
            vi, vd = T.axis.remap("SS", [i, d])
            A[base + vi, vd] = A_new[vi, vd]
    for i in range(m_new.shape[0]):
        with T.sblock("keep_max"):
            vi = T.axis.spatial(m_new.shape[0], i)
            m[base + vi] = m_new[vi]
    for i in range(m_new.shape[0]):
        with T.sblock("keep_sum"):
            vi = T.axis.spatial(m_new.shape[0], i)
            total[base + vi] = total_new[vi]


@stage
def write(
    out, lse, partial_out, partial_lse, inverse, A, m, total, dest,
    dests, dest_begin, lanes, lane_rows, head, group, dtype, on_cpu,
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
            lane: T.let[T.int32] = lane_of(vi, m.shape[0], lane_rows)
            column: T.let[T.int32] = q_head(vi, m.shape[0], lane_rows, head, group)
            if lane < lanes:
                to: T.let[T.int32] = dests[dest_begin + lane // group] if on_cpu else dest[vi]
                if to >= 0:
                    partial_out[to, column, vd] = A[vi, vd] * inverse[vi]
                else:
                    out[-1 - to, column, vd] = T.Cast(dtype, A[vi, vd] * inverse[vi])
    for i in range(m.shape[0]):
        with T.sblock("write_lse"):
            vi = T.axis.spatial(m.shape[0], i)
            lane: T.let[T.int32] = lane_of(vi, m.shape[0], lane_rows)
            column: T.let[T.int32] = q_head(vi, m.shape[0], lane_rows, head, group)
            if lane < lanes:
                to: T.let[T.int32] = dests[dest_begin + lane // group] if on_cpu else dest[vi]
                if to >= 0:
                    partial_lse[to, column] = natural_lse(m[vi], total[vi])
                else:
                    lse[-1 - to, column] = natural_lse(m[vi], total[vi])

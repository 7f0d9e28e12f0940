"""Stage 1: softmax attention of each work item over the KV runs that its rows read together.

For item ``I``, KV head ``h`` and lane row ``i`` (query row × group + query head in group), over the
tokens ``j`` of the item that the row sees,

    logit_ij = scale · (Q_i · K_j + Qrope_i · rope_j)
    out_i    = Σ_j exp(logit_ij) V_j / Σ_j exp(logit_ij)        lse_i = log Σ_j exp(logit_ij)

walked in tiles of ``kv_tile`` tokens with an online softmax: running maximum, sum and accumulator,
rescaled when the maximum grows (Milakov and Gimelshein 2018; DeFT, ICLR 2025, section 3.3).

Which rows see a token is an interval of preorder rows, so a mask is two integers a token: TVM's
tree attention masks draft rows so (``relax.frontend.nn.llm.tree_attn``); here the interval belongs
to a KV run and spans the forest. A score that is masked counts as -inf and its probability is
exactly 0. Slots that hold no token of the item are never read.

Every stage is an opaque block under a loop of one. The block makes it a scope of its own, in which
TVM accepts ``compute_at``; the loop keeps schedules from writing into the module they started from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as bind
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels.numerics import (
    LOG2_E,
    exp2_polynomial,
    finite,
    narrow,
    natural_lse,
    storage,
    widen,
)
from deft_tvm.kernels.work import work_loop
from deft_tvm.spec import AttentionSpec, TileShape

# Blocks by stage, for schedules to address.
TOKEN_BLOCKS = ("seek", "locate", "find_cut")
ROW_BLOCKS = ("init_max", "init_sum", "new_max", "rescale", "new_sum", "keep_max", "keep_sum")


def partial_attention(
    spec: AttentionSpec, tile: TileShape, kind: str = "llvm", name: str = "partial"
) -> tirx.PrimFunc:
    """The partial kernel of one tile class, with rows, items, pages and lengths dynamic.

    Args:
        spec: widths, dtypes, scale, layout.
        tile: lane rows M and tokens N of a step, and the type of the products' factors.
        kind: ``llvm`` or ``cuda``: which loop runs the work items, and which ``exp2``.
        name: the function's symbol.

    Returns:
        A function of q ``[R, Hq, q_width]``, the k, v and rope caches (a buffer again where the
        spec has no own one), the plan's header, page_indices, row_order, runs, items and dests, out
        ``[R, Hq, v_width]`` in q's dtype, lse ``[R, Hq]``, partial_out ``[W, Hq, v_width]`` and
        partial_lse ``[W, Hq]``, all float32; the LSE is in natural logarithms.
    """
    M, N, operand = tile.lane_rows, tile.kv_tile, tile.operand
    G, HQ, HK = spec.group, spec.num_q_heads, spec.num_kv_heads
    KW, RW, VW, QW = spec.k_width, spec.rope_width, spec.v_width, spec.q_width
    K0, V0 = spec.k.begin, spec.v.begin
    K_IN_V = spec.k.begin - spec.v.begin
    TIED, ROPED = spec.tied, spec.rope is not None
    k_buffer, v_buffer = spec.buffers[spec.k.buffer], spec.buffers[spec.v.buffer]
    r_buffer = spec.buffers[spec.rope if spec.rope is not None else spec.k.buffer]
    R_HEADS = r_buffer.heads
    TILE = storage(operand)
    SCALE = spec.scale * LOG2_E
    loop = work_loop(kind)
    exp2 = bind(exp2_polynomial, operand=operand) if kind == "llvm" else tirx.exp2
    at = _cache_index(spec.layout)
    shape = _cache_shape(spec.layout)

    @T.prim_func(s_tir=True)
    def kernel(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        rope_handle: T.handle,
        header_handle: T.handle,
        page_indices_handle: T.handle,
        row_order_handle: T.handle,
        runs_handle: T.handle,
        items_handle: T.handle,
        dests_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        partial_out_handle: T.handle,
        partial_lse_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        num_rows, num_runs, num_items = T.int32(), T.int32(), T.int32()
        num_indices, num_dests, num_slots = T.int32(), T.int32(), T.int32()
        q_rows = T.int64()
        k_pages, k_page, v_pages, v_page = T.int64(), T.int64(), T.int64(), T.int64()
        r_pages, r_page = T.int64(), T.int64()
        q_s0, q_s1 = T.int64(), T.int64()
        k_s0, k_s1, k_s2 = T.int64(), T.int64(), T.int64()
        v_s0, v_s1, v_s2 = T.int64(), T.int64(), T.int64()
        r_s0, r_s1, r_s2 = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(
            q_handle,
            (q_rows, T.int64(HQ), T.int64(QW)),
            spec.dtype,
            strides=[q_s0, q_s1, T.int64(1)],
        )
        k_cache = T.match_buffer(
            k_handle,
            shape(k_pages, k_page, k_buffer.heads, k_buffer.width),
            k_buffer.dtype,
            strides=[k_s0, k_s1, k_s2, T.int64(1)],
        )
        v_cache = T.match_buffer(
            v_handle,
            shape(v_pages, v_page, v_buffer.heads, v_buffer.width),
            v_buffer.dtype,
            strides=[v_s0, v_s1, v_s2, T.int64(1)],
        )
        rope_cache = T.match_buffer(
            rope_handle,
            shape(r_pages, r_page, R_HEADS, r_buffer.width),
            r_buffer.dtype,
            strides=[r_s0, r_s1, r_s2, T.int64(1)],
        )
        header = T.match_buffer(header_handle, (8,), "int32")
        page_indices = T.match_buffer(page_indices_handle, (num_indices,), "int32")
        row_order = T.match_buffer(row_order_handle, (num_rows,), "int32")
        runs = T.match_buffer(runs_handle, (num_runs, 6), "int32")
        items = T.match_buffer(items_handle, (num_items, 6), "int32")
        dests = T.match_buffer(dests_handle, (num_dests,), "int32")
        out = T.match_buffer(out_handle, (num_rows, HQ, VW), spec.dtype)
        lse = T.match_buffer(lse_handle, (num_rows, HQ), "float32")
        partial_out = T.match_buffer(partial_out_handle, (num_slots, HQ, VW), "float32")
        partial_lse = T.match_buffer(partial_lse_handle, (num_slots, HQ), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for work in loop(num_items * HK):
                with T.sblock("item"):
                    T.reads()
                    T.writes()
                    item: T.let[T.int32] = work // HK
                    head: T.let[T.int32] = work % HK
                    row_begin: T.let[T.int32] = items[item, 0]
                    lanes: T.let[T.int32] = items[item, 1] * G
                    run_begin: T.let[T.int32] = items[item, 2]
                    run_end: T.let[T.int32] = items[item, 3]
                    num_tokens: T.let[T.int32] = items[item, 4]
                    dest_begin: T.let[T.int32] = items[item, 5]
                    page_shift: T.let[T.int32] = header[0]
                    search_steps: T.let[T.int32] = header[1]
                    Q = T.sblock_alloc_buffer((M, KW), TILE)
                    Q_rope = T.sblock_alloc_buffer((M, max(RW, 1)), TILE)
                    K = T.sblock_alloc_buffer((N, KW), TILE)
                    V = T.sblock_alloc_buffer((N, VW), TILE)
                    rope = T.sblock_alloc_buffer((N, max(RW, 1)), TILE)
                    page = T.sblock_alloc_buffer((N,), "int32")
                    slot = T.sblock_alloc_buffer((N,), "int32")
                    lane_begin = T.sblock_alloc_buffer((N,), "int32")
                    lane_end = T.sblock_alloc_buffer((N,), "int32")
                    cut = T.sblock_alloc_buffer((1,), "int32")
                    S = T.sblock_alloc_buffer((M, N), "float32")
                    S_rope = T.sblock_alloc_buffer((M, N), "float32")
                    X = T.sblock_alloc_buffer((M, N), "float32")
                    P = T.sblock_alloc_buffer((M, N), TILE)
                    A = T.sblock_alloc_buffer((M, VW), "float32")
                    A_new = T.sblock_alloc_buffer((M, VW), "float32")
                    m = T.sblock_alloc_buffer((M,), "float32")
                    m_new = T.sblock_alloc_buffer((M,), "float32")
                    factor = T.sblock_alloc_buffer((M,), "float32")
                    total = T.sblock_alloc_buffer((M,), "float32")
                    total_new = T.sblock_alloc_buffer((M,), "float32")
                    for _ in T.serial(1):
                        with T.sblock("prologue"):
                            T.reads()
                            T.writes()
                            for i, d in T.grid(M, KW):
                                with T.sblock("load_q"):
                                    vi, vd = T.axis.remap("SS", [i, d])
                                    row: T.let[T.int32] = row_order[
                                        row_begin + T.min(vi, lanes - 1) // G
                                    ]
                                    Q[vi, vd] = T.Select(
                                        vi < lanes,
                                        narrow(q[row, head * G + vi % G, vd], operand),
                                        T.Cast(TILE, 0),
                                    )
                            if ROPED:
                                for i, d in T.grid(M, RW):
                                    with T.sblock("load_q_rope"):
                                        vi, vd = T.axis.remap("SS", [i, d])
                                        row: T.let[T.int32] = row_order[
                                            row_begin + T.min(vi, lanes - 1) // G
                                        ]
                                        Q_rope[vi, vd] = T.Select(
                                            vi < lanes,
                                            narrow(q[row, head * G + vi % G, KW + vd], operand),
                                            T.Cast(TILE, 0),
                                        )
                            for i in range(M):
                                with T.sblock("init_max"):
                                    vi = T.axis.spatial(M, i)
                                    m[vi] = T.float32("-inf")
                            for i in range(M):
                                with T.sblock("init_sum"):
                                    vi = T.axis.spatial(M, i)
                                    total[vi] = T.float32(0)
                            for i, d in T.grid(M, VW):
                                with T.sblock("init_out"):
                                    vi, vd = T.axis.remap("SS", [i, d])
                                    A[vi, vd] = T.float32(0)
                    for step in range((num_tokens + (N - 1)) // N):
                        with T.sblock("tile"):
                            T.reads()
                            T.writes()
                            t0: T.let[T.int32] = step * N
                            for _ in T.serial(1):
                                with T.sblock("locating"):
                                    T.reads()
                                    T.writes()
                                    run_of = T.sblock_alloc_buffer((N,), "int32")
                                    for j, s in T.grid(N, search_steps + 1):
                                        with T.sblock("seek"):
                                            vj, vs = T.axis.remap("SR", [j, s])
                                            with T.init():
                                                run_of[vj] = run_begin
                                            run_of[vj] = _seek(
                                                runs,
                                                run_of[vj],
                                                run_end,
                                                search_steps - vs,
                                                T.min(t0 + vj, num_tokens - 1),
                                            )
                                    for j in range(N):
                                        with T.sblock("locate"):
                                            vj = T.axis.spatial(N, j)
                                            run: T.let[T.int32] = run_of[vj]
                                            t: T.let[T.int32] = (
                                                T.min(t0 + vj, num_tokens - 1) - runs[run, 0]
                                            )
                                            x: T.let[T.int32] = runs[run, 2] + t
                                            page[vj] = page_indices[
                                                runs[run, 1] + T.shift_right(x, page_shift)
                                            ]
                                            slot[vj] = T.bitwise_and(
                                                x, T.shift_left(1, page_shift) - 1
                                            )
                                            lane_begin[vj] = (
                                                runs[run, 3]
                                                + T.max(0, t - runs[run, 5])
                                                - row_begin
                                            ) * G
                                            lane_end[vj] = T.Select(
                                                t0 + vj < num_tokens,
                                                (runs[run, 4] - row_begin) * G,
                                                0,
                                            )
                                    for j in range(N):
                                        with T.sblock("find_cut"):
                                            vj = T.axis.reduce(N, j)
                                            with T.init():
                                                cut[0] = 0
                                            cut[0] = cut[0] + T.Select(
                                                T.And(lane_begin[vj] <= 0, lanes <= lane_end[vj]),
                                                0,
                                                1,
                                            )
                            for _ in T.serial(1):
                                with T.sblock("loading"):
                                    T.reads()
                                    T.writes()
                                    if not TIED:
                                        for j, d in T.grid(N, KW):
                                            with T.sblock("load_k"):
                                                vj, vd = T.axis.remap("SS", [j, d])
                                                K[vj, vd] = narrow(
                                                    at(k_cache, page[vj], slot[vj], head, K0 + vd),
                                                    operand,
                                                )
                                    for j, d in T.grid(N, VW):
                                        with T.sblock("load_v"):
                                            vj, vd = T.axis.remap("SS", [j, d])
                                            V[vj, vd] = narrow(
                                                at(v_cache, page[vj], slot[vj], head, V0 + vd),
                                                operand,
                                            )
                                    if ROPED:
                                        for j, d in T.grid(N, RW):
                                            with T.sblock("load_rope"):
                                                vj, vd = T.axis.remap("SS", [j, d])
                                                rope[vj, vd] = narrow(
                                                    at(
                                                        rope_cache,
                                                        page[vj],
                                                        slot[vj],
                                                        T.min(head, R_HEADS - 1),
                                                        vd,
                                                    ),
                                                    operand,
                                                )
                            for _ in T.serial(1):
                                with T.sblock("qk"):
                                    T.reads()
                                    T.writes()
                                    for i, j, d in T.grid(M, N, KW):
                                        with T.sblock("scores"):
                                            vi, vj, vd = T.axis.remap("SSR", [i, j, d])
                                            with T.init():
                                                S[vi, vj] = T.float32(0)
                                            if TIED:
                                                S[vi, vj] = S[vi, vj] + widen(
                                                    Q[vi, vd], operand
                                                ) * widen(V[vj, K_IN_V + vd], operand)
                                            else:
                                                S[vi, vj] = S[vi, vj] + widen(
                                                    Q[vi, vd], operand
                                                ) * widen(K[vj, vd], operand)
                            if ROPED:
                                for _ in T.serial(1):
                                    with T.sblock("qk_rope"):
                                        T.reads()
                                        T.writes()
                                        for i, j, d in T.grid(M, N, RW):
                                            with T.sblock("scores_rope"):
                                                vi, vj, vd = T.axis.remap("SSR", [i, j, d])
                                                with T.init():
                                                    S_rope[vi, vj] = T.float32(0)
                                                S_rope[vi, vj] = S_rope[vi, vj] + widen(
                                                    Q_rope[vi, vd], operand
                                                ) * widen(rope[vj, vd], operand)
                            for _ in T.serial(1):
                                with T.sblock("masking"):
                                    T.reads()
                                    T.writes()
                                    if cut[0] == 0:
                                        for _ in T.serial(1):
                                            with T.sblock("whole"):
                                                T.reads()
                                                T.writes()
                                                for i, j in T.grid(M, N):
                                                    with T.sblock("logits"):
                                                        vi, vj = T.axis.remap("SS", [i, j])
                                                        X[vi, vj] = (
                                                            _score(S, S_rope, vi, vj, ROPED) * SCALE
                                                        )
                                    else:
                                        for _ in T.serial(1):
                                            with T.sblock("masked"):
                                                T.reads()
                                                T.writes()
                                                for i, j in T.grid(M, N):
                                                    with T.sblock("masked_logits"):
                                                        vi, vj = T.axis.remap("SS", [i, j])
                                                        X[vi, vj] = T.Select(
                                                            T.And(
                                                                lane_begin[vj] <= vi,
                                                                vi < lane_end[vj],
                                                            ),
                                                            _score(S, S_rope, vi, vj, ROPED)
                                                            * SCALE,
                                                            T.float32("-inf"),
                                                        )
                            for _ in T.serial(1):
                                with T.sblock("softmax"):
                                    T.reads()
                                    T.writes()
                                    E = T.sblock_alloc_buffer((M, N), "float32")
                                    m_tile = T.sblock_alloc_buffer((M,), "float32")
                                    total_tile = T.sblock_alloc_buffer((M,), "float32")
                                    for i, j in T.grid(M, N):
                                        with T.sblock("row_max"):
                                            vi, vj = T.axis.remap("SR", [i, j])
                                            with T.init():
                                                m_tile[vi] = T.min_value("float32")
                                            m_tile[vi] = T.max(m_tile[vi], X[vi, vj])
                                    for i in range(M):
                                        with T.sblock("new_max"):
                                            vi = T.axis.spatial(M, i)
                                            m_new[vi] = T.max(m[vi], m_tile[vi])
                                    for i in range(M):
                                        with T.sblock("rescale"):
                                            vi = T.axis.spatial(M, i)
                                            factor[vi] = exp2(m[vi] - finite(m_new[vi]))
                                    for i, j in T.grid(M, N):
                                        with T.sblock("exponentials"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            E[vi, vj] = exp2(X[vi, vj] - finite(m_new[vi]))
                                    for i, j in T.grid(M, N):
                                        with T.sblock("row_sum"):
                                            vi, vj = T.axis.remap("SR", [i, j])
                                            with T.init():
                                                total_tile[vi] = T.float32(0)
                                            total_tile[vi] = total_tile[vi] + E[vi, vj]
                                    for i in range(M):
                                        with T.sblock("new_sum"):
                                            vi = T.axis.spatial(M, i)
                                            total_new[vi] = total[vi] * factor[vi] + total_tile[vi]
                                    for i, j in T.grid(M, N):
                                        with T.sblock("probabilities"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            P[vi, vj] = narrow(E[vi, vj], operand)
                            for _ in T.serial(1):
                                with T.sblock("pv"):
                                    T.reads()
                                    T.writes()
                                    U = T.sblock_alloc_buffer((M, VW), "float32")
                                    for i, d, j in T.grid(M, VW, N):
                                        with T.sblock("accumulate"):
                                            vi, vd, vj = T.axis.remap("SSR", [i, d, j])
                                            with T.init():
                                                U[vi, vd] = T.float32(0)
                                            U[vi, vd] = U[vi, vd] + widen(
                                                P[vi, vj], operand
                                            ) * widen(V[vj, vd], operand)
                                    for i, d in T.grid(M, VW):
                                        with T.sblock("fold"):
                                            vi, vd = T.axis.remap("SS", [i, d])
                                            A_new[vi, vd] = A[vi, vd] * factor[vi] + U[vi, vd]
                            for _ in T.serial(1):
                                with T.sblock("keeping"):
                                    T.reads()
                                    T.writes()
                                    for i, d in T.grid(M, VW):
                                        with T.sblock("keep_out"):
                                            vi, vd = T.axis.remap("SS", [i, d])
                                            A[vi, vd] = A_new[vi, vd]
                                    for i in range(M):
                                        with T.sblock("keep_max"):
                                            vi = T.axis.spatial(M, i)
                                            m[vi] = m_new[vi]
                                    for i in range(M):
                                        with T.sblock("keep_sum"):
                                            vi = T.axis.spatial(M, i)
                                            total[vi] = total_new[vi]
                    for _ in T.serial(1):
                        with T.sblock("epilogue"):
                            T.reads()
                            T.writes()
                            inverse = T.sblock_alloc_buffer((M,), "float32")
                            for i in range(M):
                                with T.sblock("normalise"):
                                    vi = T.axis.spatial(M, i)
                                    inverse[vi] = T.if_then_else(
                                        total[vi] == T.float32(0),
                                        T.float32(0),
                                        T.float32(1) / total[vi],
                                    )
                            for i, d in T.grid(M, VW):
                                with T.sblock("write_out"):
                                    vi, vd = T.axis.remap("SS", [i, d])
                                    if vi < lanes:
                                        dest: T.let[T.int32] = dests[dest_begin + vi // G]
                                        if dest >= 0:
                                            partial_out[dest, head * G + vi % G, vd] = (
                                                A[vi, vd] * inverse[vi]
                                            )
                                        else:
                                            out[-1 - dest, head * G + vi % G, vd] = T.Cast(
                                                spec.dtype, A[vi, vd] * inverse[vi]
                                            )
                            for i in range(M):
                                with T.sblock("write_lse"):
                                    vi = T.axis.spatial(M, i)
                                    if vi < lanes:
                                        dest: T.let[T.int32] = dests[dest_begin + vi // G]
                                        if dest >= 0:
                                            partial_lse[dest, head * G + vi % G] = natural_lse(
                                                m[vi], total[vi]
                                            )
                                        else:
                                            lse[-1 - dest, head * G + vi % G] = natural_lse(
                                                m[vi], total[vi]
                                            )

    return kernel.with_attr("global_symbol", name)


def _cache_shape(layout: str) -> Callable[..., tuple[Any, ...]]:
    if layout == "NHD":
        return lambda pages, page, heads, width: (pages, page, T.int64(heads), T.int64(width))
    return lambda pages, page, heads, width: (pages, T.int64(heads), page, T.int64(width))


def _cache_index(layout: str) -> Callable[..., Expr]:
    if layout == "NHD":
        return lambda cache, page, slot, head, d: cache[page, slot, head, d]
    return lambda cache, page, slot, head, d: cache[page, head, slot, d]


def _seek(runs: Any, run: Any, run_end: Any, step: Any, token: Any) -> Expr:
    """One step of the binary search for the run of `token`: go 2^step runs on if they begin by it."""
    ahead = run + tirx.shift_left(tirx.const(1, "int32"), step)
    # The index is clamped since both sides of a select are read.
    begins = runs[tirx.min(ahead, run_end - 1), 0]
    return tirx.Select(tirx.And(ahead < run_end, begins <= token), ahead, run)


def _score(S: Any, S_rope: Any, i: Any, j: Any, roped: bool) -> Expr:
    return S[i, j] + S_rope[i, j] if roped else S[i, j]

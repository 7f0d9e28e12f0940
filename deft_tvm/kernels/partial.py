"""Stage 1: softmax attention of each work item over the KV runs that its rows read together.

For item ``I``, KV head ``h`` and lane row ``i`` (query row × group + query head in group), over the
tokens ``j`` of the item that the row sees,

    logit_ij = scale · (Q_i · K_j + Qrope_i · rope_j), or cap · tanh(that / cap)
    out_i    = Σ_j exp(logit_ij) V_j / Σ_j exp(logit_ij)        lse_i = log Σ_j exp(logit_ij)

walked in tiles of ``kv_tile`` tokens with an online softmax: running maximum, sum and accumulator,
rescaled when the maximum grows (Milakov and Gimelshein 2018; DeFT, ICLR 2025, section 3.3), and
on a GPU when it has grown by much.

Which rows see a token is an interval of preorder rows, so a mask is two integers a token: TVM's
tree attention masks draft rows so (``relax.frontend.nn.llm.tree_attn``); here the interval belongs
to a KV run and spans the forest. A score that is masked counts as -inf and its probability is
exactly 0. Slots that hold no token of the item are never read.

On a CPU the tokens of the next tile are located one tile early, and asked of memory beside this
tile's products (a GPU's schedule fetches ahead by copies of its own). Beside an item's last tile it
is the first one of the unit that the thread takes next.

Elements of 8 bits become the products' type exactly, as they are loaded. Their scales multiply
scores and probabilities, of which there are fewer, and which rounding to that type meets anyway.

A sink is a row's first token, with a logit and no value. It belongs to the row and not to a set of
tokens: an item that alone answers for a row begins with it, and other rows meet it in stage 2.

Every stage is an opaque block under a loop of one. The block makes it a scope of its own, in which
TVM accepts ``compute_at``; the loop keeps schedules from writing into the module they started from.
"""

from __future__ import annotations

from functools import cache
from functools import partial as bind
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.caches import element_of, index_of, shape_of
from deft_tvm.kernels.numerics import exp2_polynomial, lazy_max, logits_of, storage, within
from deft_tvm.kernels.stage import stage
from deft_tvm.kernels.stages import (
    UNIT_STATE_BYTES,
    begin_with_sink,
    enter,
    exponentiate,
    fill,
    find_dest,
    gather,
    grow_max,
    grow_sum,
    keep,
    leave,
    masked_logits,
    product,
    round_weights,
    weigh,
    weigh_on,
    whole_logits,
    write,
)
from deft_tvm.kernels.tokens import (
    advance,
    ahead,
    find_ahead,
    find_cut,
    find_next,
    find_scales,
    find_tokens,
    halvings,
    load,
    located_tiles,
)
from deft_tvm.kernels.work import used_parameters, work_loop
from deft_tvm.plan.columns import COLUMNS, HEADER, Item
from deft_tvm.spec import AttentionSpec, TileShape


@cache
def partial_attention(
    spec: AttentionSpec,
    tile: TileShape,
    kind: str = "llvm",
    name: str = "partial",
    threads: int = 1,
) -> tirx.PrimFunc:
    """The partial kernel of one tile class, with rows, items, pages and lengths dynamic.

    Args:
        spec: widths, dtypes, scale, layout.
        tile: lane rows M and tokens N of a step, the type of the products' factors, and how many
            KV heads a unit of work takes through each step; their rows lie one after another in
            its state.
        kind, name: ``llvm`` or ``cuda``, and the function's symbol.
        threads: of a CPU, among which units are dealt out.

    Returns:
        A function of q ``[R, Hq, q_width]``, the k, v and rope caches (a buffer again where the
        spec has no own one), where the spec has them the scales of K and V ``[pages, Hkv]`` and the
        sinks ``[Hq]``, all float32; the plan's header, page_indices, row_order, row_positions,
        runs, items and dests; out ``[R, Hq, v_width]`` in q's dtype, lse ``[R, Hq]``, partial_out
        ``[W, Hq, v_width]`` and partial_lse ``[W, Hq]``, all float32; the LSE is in natural
        logarithms.
    """
    M, N, H, operand = tile.lane_rows, tile.kv_tile, tile.heads, tile.operand
    G, HQ, HK = spec.group, spec.num_q_heads, spec.num_kv_heads
    KW, RW, VW, QW = spec.k_width, spec.rope_width, spec.v_width, spec.q_width
    K0, V0, K_IN_V = spec.k.begin, spec.v.begin, spec.k.begin - spec.v.begin
    TIED, ROPED = spec.tied, spec.rope is not None
    WINDOW, WINDOWED = spec.window, spec.window is not None
    SCALED, SINKS = bool(spec.scaled), spec.sinks
    k_buffer, v_buffer = spec.buffers[spec.k.buffer], spec.buffers[spec.v.buffer]
    r_buffer = spec.buffers[spec.rope if spec.rope is not None else spec.k.buffer]
    R_HEADS = r_buffer.heads
    UNITS = HK // H
    ROPE_ONCE = H > 1 and R_HEADS == 1
    TILE = storage(operand)
    ON_CPU = kind == "llvm"
    L, NEXT = (1, N) if ON_CPU else (located_tiles(tile), 0)
    loop = work_loop(kind)
    exp2 = bind(exp2_polynomial, operand=operand) if ON_CPU else tirx.exp2
    precise = bind(exp2_polynomial, operand="float32") if ON_CPU else tirx.exp2
    grown, *conditions = tirx.max if ON_CPU else lazy_max, *within(ON_CPU)
    logit, *powers = *logits_of(spec.scale, spec.soft_cap, precise), exp2
    at, shape = index_of(spec.layout), shape_of(spec.layout)

    def nth(head: Any, n: Any) -> Any:
        return head + n if H > 1 else head

    def begin(t0: Any) -> Any:
        """Where the tile that begins at token `t0` of the item does in the tables."""
        return 0 if ON_CPU else t0 % (L * N)

    def base(n: Any) -> Any:
        return n * M if H > 1 else 0

    def rope_head(head: Any) -> Any:
        return head if R_HEADS == HK else 0

    @stage
    def load_k(K, k_cache, page, slot, begin, head):
        load(K, k_cache, at, page, slot, begin, head, K0, operand, "load_k")

    @stage
    def load_v(V, v_cache, page, slot, begin, head):
        load(V, v_cache, at, page, slot, begin, head, V0, operand, "load_v")

    @stage
    def load_rope(rope, rope_cache, page, slot, begin, head):
        load(rope, rope_cache, at, page, slot, begin, rope_head(head), 0, operand, "load_rope")

    @script.prim_func(s_tir=True)
    def kernel(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        rope_handle: T.handle,
        k_scales_handle: T.handle,
        v_scales_handle: T.handle,
        sinks_handle: T.handle,
        header_handle: T.handle,
        page_indices_handle: T.handle,
        row_order_handle: T.handle,
        row_positions_handle: T.handle,
        runs_handle: T.handle,
        items_handle: T.handle,
        dests_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        partial_out_handle: T.handle,
        partial_lse_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        num_rows, num_runs, num_items, num_dests = T.int32(), T.int32(), T.int32(), T.int32()
        num_indices, num_slots, num_positions = T.int32(), T.int32(), T.int32()
        k_pages, k_page, v_pages, v_page = T.int64(), T.int64(), T.int64(), T.int64()
        r_pages, r_page = T.int64(), T.int64()
        q_rows, q_s0, q_s1 = T.int64(), T.int64(), T.int64()
        k_s0, k_s1, k_s2 = T.int64(), T.int64(), T.int64()
        v_s0, v_s1, v_s2 = T.int64(), T.int64(), T.int64()
        r_s0, r_s1, r_s2 = T.int64(), T.int64(), T.int64()
        ks_pages, ks_s0, ks_s1 = T.int64(), T.int64(), T.int64()
        vs_pages, vs_s0, vs_s1 = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(
            q_handle, (q_rows, T.int64(HQ), T.int64(QW)), spec.dtype,
            strides=[q_s0, q_s1, T.int64(1)],
        )  # fmt: skip
        k_cache = T.match_buffer(
            k_handle, shape(k_pages, k_page, k_buffer.heads, k_buffer.width), element_of(k_buffer),
            strides=[k_s0, k_s1, k_s2, T.int64(1)],
        )  # fmt: skip
        v_cache = T.match_buffer(
            v_handle, shape(v_pages, v_page, v_buffer.heads, v_buffer.width), element_of(v_buffer),
            strides=[v_s0, v_s1, v_s2, T.int64(1)],
        )  # fmt: skip
        rope_cache = T.match_buffer(
            rope_handle, shape(r_pages, r_page, R_HEADS, r_buffer.width), element_of(r_buffer),
            strides=[r_s0, r_s1, r_s2, T.int64(1)],
        )  # fmt: skip
        if SCALED:
            k_scales = T.match_buffer(
                k_scales_handle, (ks_pages, T.int64(HK)), "float32", strides=[ks_s0, ks_s1]
            )
            v_scales = T.match_buffer(
                v_scales_handle, (vs_pages, T.int64(HK)), "float32", strides=[vs_s0, vs_s1]
            )
        if SINKS:
            sinks = T.match_buffer(sinks_handle, (HQ,), "float32")
        header = T.match_buffer(header_handle, (HEADER,), "int32")
        page_indices = T.match_buffer(page_indices_handle, (num_indices,), "int32")
        row_order = T.match_buffer(row_order_handle, (num_rows,), "int32")
        row_positions = T.match_buffer(row_positions_handle, (num_positions,), "int32")
        runs = T.match_buffer(runs_handle, (num_runs, COLUMNS), "int32")
        items = T.match_buffer(items_handle, (num_items, COLUMNS), "int32")
        dests = T.match_buffer(dests_handle, (num_dests,), "int32")
        out = T.match_buffer(out_handle, (num_rows, HQ, VW), spec.dtype)
        lse = T.match_buffer(lse_handle, (num_rows, HQ), "float32")
        partial_out = T.match_buffer(partial_out_handle, (num_slots, HQ, VW), "float32")
        partial_lse = T.match_buffer(partial_lse_handle, (num_slots, HQ), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for work in loop(num_items * UNITS):
                with T.sblock("item"):
                    T.reads()
                    T.writes()
                    item: T.let[T.int32] = work // UNITS
                    head: T.let[T.int32] = work % UNITS * H
                    row_begin: T.let[T.int32] = items[item, Item.ROW_BEGIN]
                    lanes: T.let[T.int32] = items[item, Item.NUM_ROWS] * G
                    run_begin: T.let[T.int32] = items[item, Item.RUN_BEGIN]
                    run_end: T.let[T.int32] = items[item, Item.RUN_END]
                    num_tokens: T.let[T.int32] = items[item, Item.NUM_TOKENS]
                    dest_begin: T.let[T.int32] = items[item, Item.DEST_BEGIN]
                    last_position: T.let[T.int32] = items[item, Item.LAST_POSITION]
                    page_shift: T.let[T.int32] = header[0]
                    search_steps: T.let[T.int32] = (
                        header[1] if ON_CPU else halvings(run_end - run_begin)
                    )
                    Q = T.sblock_alloc_buffer((H * M, KW), TILE)
                    Q_rope = T.sblock_alloc_buffer((H * M, max(RW, 1)), TILE)
                    K = T.sblock_alloc_buffer((N, KW), TILE)
                    if TIED or not ON_CPU:  # otherwise it is of the stage that may inline its load
                        V = T.sblock_alloc_buffer((N, VW), TILE)
                    rope = T.sblock_alloc_buffer((N, max(RW, 1)), TILE)
                    page = T.sblock_alloc_buffer((L * N + NEXT,), "int32")
                    slot = T.sblock_alloc_buffer((L * N + NEXT,), "int32")
                    lane_begin = T.sblock_alloc_buffer((L * N + NEXT,), "int32")
                    lane_end = T.sblock_alloc_buffer((L * N + NEXT,), "int32")
                    position = T.sblock_alloc_buffer((L * N + NEXT,), "int32")
                    k_scale = T.sblock_alloc_buffer((N,), "float32")
                    v_scale = T.sblock_alloc_buffer((N,), "float32")
                    cut = T.sblock_alloc_buffer((1,), "int32")
                    next_unit = T.sblock_alloc_buffer((1,), "int32")
                    next_head = T.sblock_alloc_buffer((1,), "int32")
                    state = T.sblock_alloc_buffer((UNIT_STATE_BYTES,), "uint8")
                    S = T.sblock_alloc_buffer((M, N), "float32")
                    S_rope = T.sblock_alloc_buffer((M, N), "float32")
                    X = T.sblock_alloc_buffer((M, N), "float32")
                    P = T.sblock_alloc_buffer((M, N), TILE)
                    A = T.sblock_alloc_buffer((H * M, VW), "float32")
                    A_new = T.sblock_alloc_buffer((M, VW), "float32")
                    m = T.sblock_alloc_buffer((H * M,), "float32")
                    m_new = T.sblock_alloc_buffer((M,), "float32")
                    factor = T.sblock_alloc_buffer((M,), "float32")
                    total = T.sblock_alloc_buffer((H * M,), "float32")
                    dest = T.sblock_alloc_buffer((M,), "int32")
                    total_new = T.sblock_alloc_buffer((M,), "float32")
                    if ON_CPU:
                        for _ in T.serial(1):
                            with T.sblock("entering"):
                                T.reads()
                                T.writes()
                                enter(state)
                    for _ in T.serial(1):
                        with T.sblock("prologue"):
                            T.reads()
                            T.writes()
                            gather(
                                Q, q, row_order, row_begin, lanes, M, head, G, 0, operand, ON_CPU,
                                "load_q",
                            )  # fmt: skip
                            if ROPED:
                                gather(
                                    Q_rope, q, row_order, row_begin, lanes, M, head, G, KW, operand,
                                    ON_CPU, "load_q_rope",
                                )  # fmt: skip
                            if SINKS:
                                begin_with_sink(
                                    m, total, sinks, dests, dest_begin, lanes, M, head, G
                                )
                            else:
                                fill(m, "-inf", "init_max")
                                fill(total, 0, "init_sum")
                            if not ON_CPU:
                                find_dest(dest, dests, dest_begin, lanes, G)
                            for i, d in T.grid(H * M, VW):
                                with T.sblock("init_out"):
                                    vi, vd = T.axis.remap("SS", [i, d])
                                    A[vi, vd] = T.float32(0)
                    if ON_CPU:
                        for _ in T.serial(1):
                            with T.sblock("locating_first"):
                                T.reads()
                                T.writes()
                                find_next(next_unit, work, num_items * UNITS, threads)
                                find_tokens(
                                    page, slot, lane_begin, lane_end, position, WINDOWED, NEXT,
                                    runs, page_indices, page_shift, run_begin, run_end,
                                    search_steps, row_begin, G, 0, num_tokens, N, ON_CPU,
                                )  # fmt: skip
                    for step in range((num_tokens + (N - 1)) // N):
                        with T.sblock("tile"):
                            T.reads()
                            T.writes()
                            t0: T.let[T.int32] = step * N
                            if ON_CPU or begin(t0) == 0:
                                for _ in T.serial(1):
                                    with T.sblock("locating"):
                                        T.reads()
                                        T.writes()
                                        if ON_CPU:
                                            advance(
                                                page, slot, lane_begin, lane_end, position,
                                                WINDOWED, N,
                                            )  # fmt: skip
                                            find_ahead(
                                                page, slot, lane_begin, lane_end, position,
                                                WINDOWED, next_head, runs, page_indices, page_shift,
                                                items, item, head, next_unit, UNITS, H,
                                                search_steps, row_begin, G, t0, num_tokens, N,
                                            )  # fmt: skip
                                        else:
                                            find_tokens(
                                                page, slot, lane_begin, lane_end, position,
                                                WINDOWED, 0, runs, page_indices, page_shift,
                                                run_begin, run_end, search_steps, row_begin, G, t0,
                                                num_tokens, L * N, False,
                                            )  # fmt: skip
                            if SCALED and H == 1:
                                for _ in T.serial(1):
                                    with T.sblock("locating_scales"):
                                        T.reads()
                                        T.writes()
                                        find_scales(
                                            k_scale, v_scale, k_scales, v_scales, page, begin(t0),
                                            head, N,
                                        )  # fmt: skip
                            for _ in T.serial(1):
                                with T.sblock("cutting"):
                                    T.reads()
                                    T.writes()
                                    find_cut(
                                        cut, lane_begin, lane_end, position, begin(t0), lanes,
                                        last_position, WINDOW, N,
                                    )  # fmt: skip
                            if ROPED and ROPE_ONCE:
                                for _ in T.serial(1):
                                    with T.sblock("loading_rope"):
                                        T.reads()
                                        T.writes()
                                        load_rope(rope, rope_cache, page, slot, begin(t0), 0)
                            if not ON_CPU:
                                for _ in T.serial(1):
                                    with T.sblock("loading"):
                                        T.reads()
                                        T.writes()
                                        if not TIED:
                                            load_k(K, k_cache, page, slot, begin(t0), head)
                                        load_v(V, v_cache, page, slot, begin(t0), head)
                                        if ROPED:
                                            load_rope(rope, rope_cache, page, slot, begin(t0), head)
                            for h in range(H):
                                with T.sblock("head"):
                                    T.reads()
                                    T.writes()
                                    n: T.let[T.int32] = h
                                    if SCALED and H > 1:
                                        for _ in T.serial(1):
                                            with T.sblock("locating_scales"):
                                                T.reads()
                                                T.writes()
                                                find_scales(
                                                    k_scale, v_scale, k_scales, v_scales, page,
                                                    begin(t0), head + n, N,
                                                )  # fmt: skip
                                    for _ in T.serial(1):
                                        with T.sblock("qk"):
                                            T.reads()
                                            T.writes()
                                            if ON_CPU and TIED:
                                                load_v(V, v_cache, page, slot, 0, nth(head, n))
                                            if ON_CPU and not TIED:
                                                load_k(K, k_cache, page, slot, 0, nth(head, n))
                                                ahead(
                                                    k_cache, at, page, slot, nth(next_head[0], n),
                                                    K0, KW, N, "ahead_k",
                                                )  # fmt: skip
                                            if TIED:
                                                product(S, Q, base(n), V, K_IN_V, operand, "scores")
                                            else:
                                                product(S, Q, base(n), K, 0, operand, "scores")
                                    if ROPED:
                                        for _ in T.serial(1):
                                            with T.sblock("qk_rope"):
                                                T.reads()
                                                T.writes()
                                                if ON_CPU and not ROPE_ONCE:
                                                    load_rope(
                                                        rope, rope_cache, page, slot, 0,
                                                        nth(head, n),
                                                    )  # fmt: skip
                                                if ON_CPU:
                                                    ahead(
                                                        rope_cache, at, page, slot,
                                                        rope_head(nth(next_head[0], n)), 0, RW, N,
                                                        "ahead_rope",
                                                    )  # fmt: skip
                                                product(
                                                    S_rope, Q_rope, base(n), rope, 0, operand,
                                                    "scores_rope",
                                                )  # fmt: skip
                                    for _ in T.serial(1):
                                        with T.sblock("masking"):
                                            T.reads()
                                            T.writes()
                                            if cut[0] == 0:
                                                for _ in T.serial(1):
                                                    with T.sblock("whole"):
                                                        T.reads()
                                                        T.writes()
                                                        whole_logits(
                                                            X, S, S_rope, ROPED, k_scale, SCALED,
                                                            logit,
                                                        )  # fmt: skip
                                            else:
                                                for _ in T.serial(1):
                                                    with T.sblock("masked"):
                                                        T.reads()
                                                        T.writes()
                                                        masked_logits(
                                                            X, S, S_rope, ROPED, k_scale, SCALED,
                                                            logit, lane_begin, lane_end, position,
                                                            begin(t0), row_positions, row_begin,
                                                            lanes, G, WINDOW, *conditions,
                                                        )  # fmt: skip
                                    for _ in T.serial(1):
                                        with T.sblock("softmax"):
                                            T.reads()
                                            T.writes()
                                            E = T.sblock_alloc_buffer((M, N), "float32")
                                            W = T.sblock_alloc_buffer((M, N), "float32")
                                            grow_max(m_new, factor, m, base(n), X, grown, *powers)
                                            exponentiate(E, X, m_new, *powers)
                                            if not ON_CPU:
                                                round_weights(P, W, E, v_scale, SCALED, operand)
                                            grow_sum(total_new, total, base(n), factor, E)
                                            if ON_CPU:
                                                round_weights(P, W, E, v_scale, SCALED, operand)
                                    for _ in T.serial(1):
                                        with T.sblock("pv"):
                                            T.reads()
                                            T.writes()
                                            if ON_CPU and not TIED:
                                                V = T.sblock_alloc_buffer((N, VW), TILE)
                                                load_v(V, v_cache, page, slot, 0, nth(head, n))
                                            if ON_CPU:
                                                ahead(
                                                    v_cache, at, page, slot, nth(next_head[0], n),
                                                    V0, VW, N, "ahead_v",
                                                )  # fmt: skip
                                                U = T.sblock_alloc_buffer((M, VW), "float32")
                                                weigh(A_new, U, A, base(n), factor, P, V, operand)
                                            else:
                                                weigh_on(A_new, A, base(n), factor, P, V, operand)
                                    for _ in T.serial(1):
                                        with T.sblock("keeping"):
                                            T.reads()
                                            T.writes()
                                            keep(A, A_new, m, m_new, total, total_new, base(n))
                    for _ in T.serial(1):
                        with T.sblock("epilogue"):
                            T.reads()
                            T.writes()
                            inverse = T.sblock_alloc_buffer((H * M,), "float32")
                            write(
                                out, lse, partial_out, partial_lse, inverse, A, m, total, dest,
                                dests, dest_begin, lanes, M, head, G, spec.dtype, ON_CPU,
                            )  # fmt: skip
                    if ON_CPU:
                        for _ in T.serial(1):
                            with T.sblock("leaving"):
                                T.reads()
                                T.writes()
                                leave(state)

    return used_parameters(kernel).with_attr("global_symbol", name)

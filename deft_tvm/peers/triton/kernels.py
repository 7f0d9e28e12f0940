"""Both stages in Triton: partial attention of a tile's query rows, and the merge by LSE.

A *lane* is one query head of one row; the heads of a KV head's group are neighbours, so that a
tile reads its KV once for all of them. The scale of logits carries log2 e, and exponentials and
LSEs are of base 2.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""A running maximum before anything was seen: finite, so that no difference of two is NaN."""


@triton.jit
def _cache_row(slot, head, HEADS: tl.constexpr, PAGE: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """Which row of a cache, seen as rows of one head's elements, holds a token's slot."""
    in_head = (slot // PAGE * HEADS + head) * PAGE + slot % PAGE
    return in_head if HEADS_FIRST else slot * HEADS + head


@triton.jit
def _columns(row, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of what begins at `row`, zeros beyond WIDTH; a mask costs where none is due."""
    if WIDTH == BLOCK:
        loaded = tl.load(row[:, None] + column[None, :])
    else:
        loaded = tl.load(row[:, None] + column[None, :], mask=(column < WIDTH)[None, :], other=0.0)
    return loaded


@triton.jit(do_not_specialize=["scale"])
def attend(
    q,
    k,
    v,
    rope,
    slots,
    sight,
    entry_row,
    entry_source,
    entry_place,
    tiles,
    out,
    partial,
    lse,
    scale,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    TIED: tl.constexpr,
    K_BEGIN: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_CACHED: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BEGIN: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_CACHED: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROPE_HEADS: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile and KV head a program; see `launch.step` for the arguments."""
    head = tl.program_id(0) % KV_HEADS
    tile = tiles + tl.program_id(0) // KV_HEADS * 4
    begin = tl.load(tile)
    end = tl.load(tile + 1)
    first_lane = tl.load(tile + 2)
    end_lane = tl.load(tile + 3)

    lane = first_lane + tl.arange(0, BLOCK_M)
    valid = lane < end_lane
    lane = tl.minimum(lane, end_lane - 1)
    entry = lane // GROUP
    source = tl.load(entry_source + entry).to(tl.int64)
    q_head = head * GROUP + lane % GROUP
    q_row = q + (source * (KV_HEADS * GROUP) + q_head) * (K_WIDTH + ROPE_WIDTH)

    v_column = tl.arange(0, V_BLOCK)
    if TIED:
        # The state's columns that are not keys meet zeros, so that it is loaded once, as V.
        k_column = v_column
        q_column = v_column + (V_BEGIN - K_BEGIN)
        if K_WIDTH == V_BLOCK:
            queries = tl.load(q_row[:, None] + q_column[None, :])
        else:
            is_key = (q_column >= 0) & (q_column < K_WIDTH)
            queries = tl.load(q_row[:, None] + q_column[None, :], mask=is_key[None, :], other=0.0)
    else:
        k_column = tl.arange(0, K_BLOCK)
        queries = _columns(q_row, k_column, K_WIDTH, K_BLOCK)
    if ROPE_WIDTH > 0:
        rope_column = tl.arange(0, ROPE_BLOCK)
        is_rope = (rope_column < ROPE_WIDTH)[None, :]
        rotated = tl.load(q_row[:, None] + K_WIDTH + rope_column[None, :], mask=is_rope, other=0.0)
    if MASKED:
        row = tl.load(entry_row + entry)

    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        # Beyond the end the last token again: slots that nobody owns may hold NaN.
        held = tl.minimum(token, end - 1)
        slot = tl.load(slots + held).to(tl.int64)
        cached = _cache_row(slot, head, KV_HEADS, PAGE, HEADS_FIRST)
        v_row = v + cached * V_CACHED + V_BEGIN
        if TIED:
            state = _columns(v_row, v_column, V_WIDTH, V_BLOCK)
            logits = tl.dot(queries, tl.trans(state))
        else:
            k_row = k + cached * K_CACHED + K_BEGIN
            keys = _columns(k_row, k_column, K_WIDTH, K_BLOCK)
            logits = tl.dot(queries, tl.trans(keys))
        if ROPE_WIDTH > 0:
            rope_head = head if ROPE_HEADS > 1 else 0
            rope_row = rope + ROPE_WIDTH * _cache_row(
                slot, rope_head, ROPE_HEADS, PAGE, HEADS_FIRST
            )
            rope_keys = tl.load(rope_row[:, None] + rope_column[None, :], mask=is_rope, other=0.0)
            logits = tl.dot(rotated, tl.trans(rope_keys), logits)

        sees = (token < end)[None, :]
        if MASKED:
            seen = tl.load(sight + held)
            first_row, end_row = seen & 0xFFFF, (seen >> 16) & 0xFFFF
            sees = sees & (row[:, None] >= first_row[None, :]) & (row[:, None] < end_row[None, :])
        logits = tl.where(sees, logits * scale, float("-inf"))

        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = values * shrink[:, None]
        highest = higher
        if not TIED:
            state = _columns(v_row, v_column, V_WIDTH, V_BLOCK)
        values = tl.dot(weights.to(state.dtype), state, values)

    values = values / tl.where(total > 0, total, 1.0)[:, None]
    place = tl.load(entry_place + entry).to(tl.int64)
    alone = place < 0
    width = (v_column < V_WIDTH)[None, :]
    target = out + (source * (KV_HEADS * GROUP) + q_head) * V_WIDTH
    tl.store(
        target[:, None] + v_column[None, :],
        values.to(out.dtype.element_ty),
        mask=(valid & alone)[:, None] & width,
    )
    target = place * (KV_HEADS * GROUP) + q_head
    parted = valid & ~alone
    tl.store(
        partial + target[:, None] * V_WIDTH + v_column[None, :],
        values,
        mask=parted[:, None] & width,
    )
    tl.store(lse + target, highest + tl.log2(total), mask=parted)


@triton.jit
def merge(
    partial,
    lse,
    rows,
    out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of one row `BLOCK_H` heads and `BLOCK_D` columns a program; its partials are neighbours."""
    row = rows + tl.program_id(0) * 3
    source = tl.load(row).to(tl.int64)
    begin = tl.load(row + 1)
    end = tl.load(row + 2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_head = head < HEADS
    is_column = column < WIDTH

    highest = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    values = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        there = (part < end)[:, None] & is_head[None, :]
        place = part.to(tl.int64)[:, None] * HEADS + head[None, :]
        found = tl.load(lse + place, mask=there, other=float("-inf"))
        read = tl.load(
            partial + place[:, :, None] * WIDTH + column[None, None, :],
            mask=there[:, :, None] & is_column[None, None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(found, 0))
        weights = tl.exp2(found - higher[None, :])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 0)
        values = values * shrink[:, None] + tl.sum(weights[:, :, None] * read, 0)
        highest = higher
    values = values / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + (source * HEADS + head[:, None]) * WIDTH + column[None, :],
        values.to(out.dtype.element_ty),
        mask=is_head[:, None] & is_column[None, :],
    )

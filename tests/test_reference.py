"""The oracle against torch's own attention in float64, and the laws of merging."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from deft_tvm.reference import Exact, dense_mask, merge_states, tree_attention

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = WIDTH**-0.5


# The chain below 1 has a node without tokens but with rows; node 5 has all its tokens as rows.
PARENTS = [-1, 0, 0, 1, -1, 4, 3]
LENGTHS = [6, 3, 2, 0, 5, 3, 2]
ROWS = [0, 1, 2, 2, 0, 3, 1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Both are float64 and sum a few dozen terms of about 1: some dozens of 2⁻⁵³."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-14)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parents: list[int] = PARENTS,
    lengths: list[int] = LENGTHS,
    rows: list[int] = ROWS,
) -> Exact:
    """Contiguous caches ``[tokens, heads, width]``."""
    return tree_attention(
        q,
        [k, v],
        parents,
        lengths,
        rows,
        None,
        page_size=16,
        layout="NHD",
        num_kv_heads=KV_HEADS,
        k=(0, 0, WIDTH),
        v=(1, 0, WIDTH),
        scale=SCALE,
    )


def example(tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = random(rows, HEADS, WIDTH), random(tokens, KV_HEADS, WIDTH, seed=1), random(1)
    v = random(tokens, KV_HEADS, WIDTH, seed=2)
    return q, k, v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)
    return out.transpose(0, 1)


def test_mask_of_a_hand_worked_tree() -> None:
    mask = dense_mask([-1, 0, 0], [3, 2, 1], [1, 2, 1])
    assert mask.int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_mask_of_a_node_without_tokens_is_its_path() -> None:
    assert dense_mask([-1, 0], [2, 0], [0, 2]).tolist() == [[True, True]] * 2


def test_rows_of_a_bidirectional_node_see_it_whole() -> None:
    causal = dense_mask([-1, 0], [2, 2], [2, 2])
    mixed = dense_mask([-1, 0], [2, 2], [2, 2], [True, False])
    assert causal.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert mixed.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_every_row_agrees_with_torch_on_the_flattened_tree() -> None:
    q, k, v = example(sum(LENGTHS), sum(ROWS))
    out, _ = attend(q, k, v)
    assert_close(out, sdpa(q, k, v, dense_mask(PARENTS, LENGTHS, ROWS)))


def test_every_row_agrees_with_torch_on_its_own_path() -> None:
    q, k, v = example(sum(LENGTHS), sum(ROWS))
    out, _ = attend(q, k, v)
    paths = [(0, 9), (0, 6, 9, 10), (0, 6, 9, 11), (0, 9), (0, 9)]
    paths += [(11, 17), (11, 18), (11, 19), (0, 9, 19, 21)]
    for row, ends in enumerate(paths):
        tokens = torch.cat([torch.arange(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)])
        every = torch.ones(1, len(tokens), dtype=torch.bool)
        expected = sdpa(q[row : row + 1], k[tokens], v[tokens], every)
        assert_close(out[row : row + 1], expected)


def test_lse_is_the_natural_logarithm_of_the_sum() -> None:
    q, k, v = example(4, 1)
    _, lse = attend(q, k, v, parents=[-1], lengths=[4], rows=[1])
    logits = torch.einsum("hd,thd->ht", q[0], k.repeat_interleave(2, 1)) * SCALE
    assert_close(lse[0], logits.exp().sum(1).log())


def test_a_row_that_sees_nothing_is_zero_and_minus_infinity() -> None:
    q, k, v = example(2, 2)
    out, lse = attend(q, k, v, parents=[-1, -1], lengths=[0, 2], rows=[1, 1])
    assert out[0].eq(0).all() and lse[0].eq(-math.inf).all()
    assert out[1].ne(0).all() and lse[1].isfinite().all()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shuffled_pages_shared_by_two_nodes_and_poisoned_elsewhere(layout: str) -> None:
    q, k, v = example(7, 2)
    # Node 0 fills page 2 and slot 0 of page 0; node 1 goes on in slot 1 of page 0.
    pages, slots = torch.tensor([2, 2, 2, 2, 0, 0, 0]), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    paged = []
    for buffer in (k, v):
        cache = torch.full((3, 4, KV_HEADS, WIDTH), math.nan, dtype=torch.float64)
        cache[pages, slots] = buffer
        paged.append(cache.transpose(1, 2) if layout == "HND" else cache)
    tree = [-1, 0], [5, 2], [0, 2]
    exact = tree_attention(
        q,
        paged,
        *tree,
        torch.tensor([2, 0, 0]),
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 1]),
        page_size=4,
        layout=layout,
        num_kv_heads=KV_HEADS,
        k=(0, 0, WIDTH),
        v=(1, 0, WIDTH),
        scale=SCALE,
    )
    expected = attend(q, k, v, *tree)
    assert torch.equal(exact.out, expected.out) and torch.equal(exact.lse, expected.lse)


def test_a_tied_state_with_one_rope_for_all_heads() -> None:
    state, rope = random(5, KV_HEADS, WIDTH, seed=1), random(5, 1, 4, seed=2)
    q = random(1, HEADS, 6 + 4)
    out, _ = tree_attention(
        q,
        [state, rope],
        [-1],
        [5],
        [1],
        None,
        page_size=16,
        layout="NHD",
        num_kv_heads=KV_HEADS,
        k=(0, 0, 6),
        v=(0, 0, WIDTH),
        rope=1,
        scale=SCALE,
    )
    keys = torch.cat([state[..., :6], rope.expand(-1, KV_HEADS, -1)], -1)
    expected = sdpa(q, keys, state, torch.ones(1, 5, dtype=torch.bool))
    assert_close(out, expected)


def test_a_chain_of_5000_nodes_is_no_recursion() -> None:
    n = 5000
    q, k, v = example(n, 1)
    out, _ = attend(
        q, k, v, parents=list(range(-1, n - 1)), lengths=[1] * n, rows=[0] * (n - 1) + [1]
    )
    assert_close(out, sdpa(q, k, v, torch.ones(1, n, dtype=torch.bool)))


def states(*counts: int) -> tuple[torch.Tensor, torch.Tensor, Exact]:
    """Attention of one row over each of some sets of tokens, stacked, and over their union."""
    q, k, v = example(sum(counts), 1)
    parts, begin = [], 0
    for n in counts:
        span = slice(begin, begin := begin + n)
        parts.append(attend(q, k[span], v[span], parents=[-1], lengths=[n], rows=[1]))
    whole = attend(q, k, v, parents=[-1], lengths=[begin], rows=[1])
    return torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]), whole


def test_merged_states_are_attention_over_the_union() -> None:
    outs, lses, whole = states(5, 1, 9)
    out, lse = merge_states(outs, lses)
    assert_close(out, whole.out)
    assert_close(lse, whole.lse)


def test_merging_is_associative_and_commutative() -> None:
    outs, lses, _ = states(5, 1, 9)
    once = merge_states(outs, lses)
    nested = merge_states(outs[1:], lses[1:])
    twice = merge_states(torch.stack([nested[0], outs[0]]), torch.stack([nested[1], lses[0]]))
    for one, other in zip(twice, once, strict=True):
        assert_close(one, other)


def test_an_empty_state_changes_nothing_and_two_stay_empty() -> None:
    outs, lses, whole = states(5, 0)
    out, lse = merge_states(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, whole.lse)
    out, lse = merge_states(outs[1:].repeat(2, 1, 1, 1), lses[1:].repeat(2, 1, 1))
    assert out.eq(0).all() and lse.eq(-math.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_an_honest_computation_stays_within_the_bound(dtype: str, size: float) -> None:
    inputs = [x.to(getattr(torch, dtype)) for x in example(3000, 1)]
    inputs[0] = inputs[0] * size
    q, k, v = inputs
    exact = attend(q, k, v, [-1], [3000], [1])
    q, k, v = (x.float() for x in inputs)
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    logits = (keys @ q[0, :, :, None])[..., 0] * SCALE
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    total = weights.sum(1)
    rounded = weights.to(inputs[0].dtype).float()
    out = ((rounded[:, None] @ values)[:, 0] / total[:, None]).to(inputs[0].dtype)
    lse = logits.amax(1) + total.log()
    bound = exact.bound(dtype, dtype)
    assert (out.double() - exact.out[0]).abs().max() <= bound.out
    assert (lse.double() - exact.lse[0]).abs().max() <= bound.lse


def test_rounding_weights_to_16_bits_exceeds_the_float32_bound() -> None:
    q, k, v = example(40, 1)
    exact = attend(q, k, v, parents=[-1], lengths=[40], rows=[1])
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    weights = ((keys @ q[0, :, :, None])[..., 0] * SCALE).softmax(1)
    out = (weights.bfloat16().double()[:, None] @ values)[:, 0]
    error = (out - exact.out[0]).abs().max()
    assert exact.bound().out < error <= exact.bound("bfloat16").out


def test_no_rows_have_a_bound_too() -> None:
    q, k, v = example(3, 0)
    exact = attend(q, k, v, [-1], [3], [0])
    assert exact.out.shape == (0, HEADS, WIDTH)
    assert exact.bound("float16", "float16").out == 2**-25


def test_the_bound_by_hand() -> None:
    exact = Exact(
        out=torch.tensor([[[0.5]]], dtype=torch.float64),
        lse=torch.tensor([[2.0]], dtype=torch.float64),
        max_logit=3.0,
        max_value=2.0,
        max_tokens=1,
    )
    assert exact.bound().out == 16 * 2**-24 * 4 * 2
    assert exact.bound().lse == 16 * 2**-24 * 4
    sixteen_bit = exact.bound("bfloat16", "bfloat16").out - exact.bound().out
    assert sixteen_bit == pytest.approx(2**-8 * 2 + 2**-8 * 0.5, rel=1e-12)
    tiny = exact.bound("float16").out - exact.bound().out
    assert tiny == pytest.approx((2**-11 + 2**-25) * 2, rel=1e-12)

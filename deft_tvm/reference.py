"""The oracle: tree attention in float64, row by row from the definition, and the error to expect.

Nothing here is shared with the corridor that it judges, so trees are plain lists and there are no
intervals, tiles or partials. Tokens are numbered node by node in the caller's order. Row ``i`` of
the ``r`` rows of a node of ``n`` tokens is the node's token ``n - r + i``, and it sees

    the tokens of all ancestors, and the node's own tokens up to itself,

in a node without tokens all ancestors'. With ``h`` a KV head, ``q`` one of the query heads that
share it, and K and V the regions of the cache buffers that a specification names,

    K_h = kv[k.buffer][h, k.begin:k.end] ⊕ rope        V_h = kv[v.buffer][h, v.begin:v.end]
    s_j = scale · q·K_j        L = ln Σ_j exp(s_j)        O = Σ_j exp(s_j - L) V_j

(Vaswani et al. 2017, section 3.2.1), where a head may have a sink s too, so that its L is the sum
over all j and s (gpt-oss). A row that sees nothing has O = 0 and L = -∞, or s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Integers = Sequence[int] | Tensor
Columns = tuple[int, int, int]

FLOAT32_ROUNDING = 2.0**-24
FLOAT32_FACTOR = 16
"""``c`` of `Exact.bound`."""


@dataclass(frozen=True)
class Bound:
    """Largest absolute errors that correct rounding explains; one number for all rows and heads."""

    out: float
    lse: float


@dataclass(frozen=True)
class Exact:
    """What `tree_attention` finds; unpacks as ``out, lse``.

    Attributes:
        out: float64[rows, query heads, v_width].
        lse: float64[rows, query heads], natural logarithm.
        max_logit: the largest |s_j| of any row and head; with a cap, what `sensitivity` says.
        max_value: the largest element of |V| that any row sees.
        max_tokens: the most tokens that one row sees.
    """

    out: Tensor
    lse: Tensor
    max_logit: float
    max_value: float
    max_tokens: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.out, self.lse))

    def bound(self, operand: str = "float32", dtype: str = "float32") -> Bound:
        """How far a kernel with float32 accumulation may be from `out` and `lse`.

        Args:
            operand: element type of both factors of both products. It must hold q, K and V as
                they are: float32, or the 16-bit type of all three.
            dtype: element type of the returned output; LSE is always float32.

        With ε = 2⁻²⁴, half an ulp of float32 at 1, and c = 16:

        *float32.* A logit is a float32 sum of rounded products, scaled: off by some multiples of
        ε·max|s|. The exponential turns that into a relative error of each weight and adds a few ε
        of its own, and so do sums and the merge; a weighted mean of V whose weights have relative
        errors up to δ moves by at most 2δ·max|V|. Together ``c·ε·(1 + max|s|)·max|V|``. Rounding
        to nearest grows as the square root of the number of terms, so that c = 16 holds for any
        width and length in use, where the worst case over all roundings would not.

        *P in a narrower operand.* ``P_j = exp(s_j - m)``, at most 1 by the running maximum m, is
        rounded before it meets V; its sum Σ P ≥ 1, by which the output is divided, is not. Each
        ``|ΔP_j| ≤ u·P_j`` with u half the type's ε (bfloat16 2⁻⁸, float16 2⁻¹¹), or at most t,
        half its smallest subnormal, where P_j is below the normal range (float16 2⁻²⁵). So
        ``|Σ ΔP_j V_j| / Σ P_j ≤ (u + tokens·t)·max|V|``.

        *A narrower output* is rounded once: u·max|out| + t.

        *LSE* is ``m + ln Σ P`` of unrounded P, at most max|s| + ln tokens in magnitude:
        ``c·ε·(1 + max|s| + ln tokens)``.
        """
        rounded = FLOAT32_FACTOR * FLOAT32_ROUNDING * (1 + self.max_logit)
        out = rounded * self.max_value
        if operand != "float32":
            relative, absolute = _half_ulp(operand)
            out += (relative + self.max_tokens * absolute) * self.max_value
        if dtype != "float32":
            relative, absolute = _half_ulp(dtype)
            max_out = float(self.out.abs().amax()) if self.out.numel() else 0.0
            out += relative * max_out + absolute
        spread = FLOAT32_FACTOR * FLOAT32_ROUNDING * math.log(max(1, self.max_tokens))
        return Bound(out, rounded + spread)


def tree_attention(
    q: Tensor,
    buffers: Sequence[Tensor],
    parents: Integers,
    lengths: Integers,
    rows: Integers,
    page_indices: Integers | None,
    page_indptr: Integers | None = None,
    first_slot: Integers | None = None,
    *,
    page_size: int,
    layout: str,
    num_kv_heads: int,
    k: Columns,
    v: Columns,
    rope: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    bidirectional: Sequence[bool] | None = None,
    window: int | None = None,
    scales: Sequence[Tensor | None] | None = None,
    sinks: Tensor | None = None,
) -> Exact:
    """Attention of every row over its path, in float64.

    Args:
        q: [rows, query heads, k width + rope width], nope then rope.
        buffers: the cache; each [pages, page_size, heads, width], or [pages, heads, page_size,
            width] if `layout` is ``"HND"``. Without `page_indices`: [tokens, heads, width].
        parents: for each node the number of its parent, -1 for a root.
        lengths: for each node its KV tokens.
        rows: for each node its query rows.
        page_indices: the pages of all nodes, end to end; None where nodes lie back to back.
        page_indptr: node i's pages are ``page_indices[page_indptr[i]:page_indptr[i + 1]]``.
        first_slot: slot of the node's first token in the first of them; 0 by default.
        page_size: tokens a page.
        layout: ``"NHD"`` or ``"HND"``.
        num_kv_heads: KV heads; query head ``j`` uses number ``j // group``.
        k: (buffer, begin, end), the columns that are multiplied with q.
        v: (buffer, begin, end), the columns that are averaged.
        rope: number of the buffer with the rotated part of K, of 1 or `num_kv_heads` heads.
        scale: multiplies q·K.
        soft_cap: the largest logit c of ``c · tanh(scale · q·K / c)``; None for no such bound.
        bidirectional: for each node whether its rows see all of it; by default none do.
        window: tokens so many positions or more before a row's own are not seen; None: all are.
        scales: for each buffer by what its elements are multiplied, [heads] or [pages, heads];
            None for those that are taken as they are.
        sinks: [query heads], a logit of each head that counts in the sum and has no value.
    """
    place = _places(lengths, page_indices, page_indptr, first_slot, page_size).to(q.device)
    if page_indices is None:
        buffers, layout = [buffer[None] for buffer in buffers], "NHD"
    heads_first = [b if layout == "HND" else b.transpose(1, 2) for b in buffers]
    factors = [None] * len(buffers) if scales is None else scales

    out = q.new_zeros((*q.shape[:2], v[2] - v[1]), dtype=torch.float64)
    sink = q.new_full((), -math.inf, dtype=torch.float64) if sinks is None else sinks
    lse = sink.double().expand(q.shape[:2]).clone()
    max_logit, max_value, max_tokens = _largest(sinks), 0.0, 0
    for row, tokens in enumerate(_seen(parents, lengths, rows, bidirectional, window)):
        if not len(tokens):
            continue
        page, slot = place[:, tokens]
        read = [
            scaled(b[page, :, slot].double(), factor, page).transpose(0, 1)
            for b, factor in zip(heads_first, factors, strict=True)
        ]
        keys, values = read[k[0]][..., k[1] : k[2]], read[v[0]][..., v[1] : v[2]]
        if rope is not None:
            keys = torch.cat([keys, read[rope].expand(num_kv_heads, -1, -1)], dim=-1)
        queries = q[row].double().unflatten(0, (num_kv_heads, -1))
        logits = scale * (queries @ keys.transpose(1, 2))
        max_logit = max(max_logit, float(sensitivity(logits, soft_cap).amax()))
        logits = capped(logits, soft_cap)
        total = torch.logaddexp(logits.logsumexp(-1), lse[row].view(logits.shape[:2]))
        out[row] = ((logits - total[..., None]).exp() @ values).flatten(0, 1)
        lse[row] = total.flatten()
        max_value = max(max_value, float(values.abs().amax()))
        max_tokens = max(max_tokens, len(tokens))
    return Exact(out, lse, max_logit, max_value, max_tokens)


def scaled(read: Tensor, factor: Tensor | None, page: Tensor) -> Tensor:
    """[tokens, heads, width] of a buffer times the scales of the tokens' pages."""
    if factor is None:
        return read
    return read * (factor[page] if factor.dim() == 2 else factor).double().unsqueeze(-1)


def _largest(sinks: Tensor | None) -> float:
    """In magnitude; an infinite sink is none."""
    if sinks is None:
        return 0.0
    return float(sinks.nan_to_num(neginf=0.0).abs().max())


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """``c · tanh(s / c)`` of each logit s; with no cap as they are."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def sensitivity(logits: Tensor, soft_cap: float | None) -> Tensor:
    """What relative errors of a logit s become in the softmax, in units of that error: |s|.

    With a cap c the error of s shrinks by the slope of c·tanh(s/c), 1 - tanh², and that of the
    bounded logit itself is added.
    """
    if soft_cap is None:
        return logits.abs()
    bounded = torch.tanh(logits / soft_cap)
    return logits.abs() * (1 - bounded**2) + soft_cap * bounded.abs()


def dense_mask(
    parents: Integers,
    lengths: Integers,
    rows: Integers,
    bidirectional: Sequence[bool] | None = None,
    window: int | None = None,
) -> Tensor:
    """bool[rows, tokens], true where the row sees the token: the mask of one flattened call."""
    mask = torch.zeros(sum(_integers(rows)), sum(_integers(lengths)), dtype=torch.bool)
    for row, tokens in enumerate(_seen(parents, lengths, rows, bidirectional, window)):
        mask[row, tokens] = True
    return mask


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of tokens, from attention over each.

        L = ln Σ_i exp(L_i)        O = Σ_i exp(L_i - L) O_i

    Args:
        outs: [sets, ..., width].
        lses: [sets, ...], natural logarithm; -∞ for a set without tokens.

    Returns:
        float64[..., width] and float64[...]; zeros and -∞ where no set has a token.
    """
    lses = lses.double()
    total = lses.logsumexp(0)
    weights = torch.where(lses == -math.inf, 0.0, (lses - total).exp())
    return (weights.unsqueeze(-1) * outs.double()).sum(0), total


def _seen(
    parents: Integers,
    lengths: Integers,
    rows: Integers,
    bidirectional: Sequence[bool] | None,
    window: int | None,
) -> Iterator[Tensor]:
    """For every row in the caller's order the numbers of the tokens that it sees, root first.

    A row without KV of its own stands where the last token of its path does.
    """
    parent, length = _integers(parents), _integers(lengths)
    ends = list(accumulate(length))
    for node, count in enumerate(_integers(rows)):
        above = []
        ancestor = parent[node] if count else -1
        while ancestor >= 0:
            above.append(torch.arange(ends[ancestor] - length[ancestor], ends[ancestor]))
            ancestor = parent[ancestor]
        start, begin = sum(map(len, above)), ends[node] - length[node]
        whole = bidirectional is not None and bidirectional[node]
        for i in range(count):
            own = length[node] - count + i + 1 if length[node] else 0
            end = begin + (length[node] if whole else own)
            path = torch.cat([*reversed(above), torch.arange(begin, end)])
            yield path if window is None else path[max(0, start + own - window) :]


def _places(
    lengths: Integers,
    page_indices: Integers | None,
    page_indptr: Integers | None,
    first_slot: Integers | None,
    page_size: int,
) -> Tensor:
    """int64[2, tokens], page and slot of every token; one long page where there are no indices."""
    if page_indices is None or page_indptr is None:
        slot = torch.arange(sum(_integers(lengths)))
        return torch.stack([torch.zeros_like(slot), slot])
    indices, indptr = _integers(page_indices), _integers(page_indptr)
    first = [0] * len(lengths) if first_slot is None else _integers(first_slot)
    places = [
        (indices[indptr[node] + x // page_size], x % page_size)
        for node, length in enumerate(_integers(lengths))
        for x in range(first[node], first[node] + length)
    ]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T


def _integers(values: Integers) -> list[int]:
    return [int(value) for value in values]


def _half_ulp(dtype: str) -> tuple[float, float]:
    """Largest errors of rounding to nearest: relative of normal numbers, absolute of tiny ones."""
    info = torch.finfo(getattr(torch, dtype))
    return info.eps / 2, info.smallest_normal * info.eps / 2

"""Absorption: latent attention without expanding the cache (DeepSeek-V2, section 2.1.2).

A head's key is ``W_UK c`` and its value ``W_UV c``, for the latent c that is cached. Since

    q · (W_UK c) = (W_UKᵀ q) · c        Σ_j p_j W_UV c_j = W_UV (Σ_j p_j c_j)

the first factor can move to the query and the second behind the attention, behind the merge too.
A bias of the key's projection would add the same to all logits of a query: the output stays, but
the LSE of absorbed logits is another, so absorbed and expanded partials must not be merged.
"""

from __future__ import annotations

from torch import Tensor, cat, einsum

from deft_tvm.errors import InputError


def absorb_query(q_nope: Tensor, q_rope: Tensor, w_uk: Tensor) -> Tensor:
    """The query that meets latents: ``W_UKᵀ q_nope ⊕ q_rope``.

    Args:
        q_nope: [rows, heads, nope width], of any float type, which all three have.
        q_rope: [rows, heads, rope width], rotated by the row's position; rope width 0 is allowed.
        w_uk: [heads, nope width, latent width], a head's up-projection of keys.

    Returns:
        [rows, heads, latent width + rope width], what ``TreeAttention.run`` takes.

    Raises:
        InputError: widths or heads do not fit each other.
    """
    _check("w_uk", w_uk, q_nope, axis=1)
    return cat([einsum("rhn,hnc->rhc", q_nope, w_uk), q_rope], dim=-1)


def expand_output(out: Tensor, w_uv: Tensor) -> Tensor:
    """The output of each head: ``W_UV`` applied to its mean of latents.

    Args:
        out: [rows, heads, latent width], as ``TreeAttention.run`` returns it; of the weight's type.
        w_uv: [heads, value width, latent width], a head's up-projection of values.

    Returns:
        [rows, heads, value width].

    Raises:
        InputError: widths or heads do not fit each other.
    """
    _check("w_uv", w_uv, out, axis=2)
    return einsum("rhc,hvc->rhv", out, w_uv)


def _check(name: str, weight: Tensor, rows: Tensor, axis: int) -> None:
    """One matrix for each head of `rows`, whose `axis` is as long as a row is wide."""
    heads, width = rows.shape[1:]
    if weight.dim() != 3 or (weight.shape[0], weight.shape[axis]) != (heads, width):
        raise InputError(
            f"{name} has shape {tuple(weight.shape)}; expected {heads} heads in axis 0 and width "
            f"{width} in axis {axis}"
        )

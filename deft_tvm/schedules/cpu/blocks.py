"""Which of the partial kernel's blocks there are for a spec, and how wide they are."""

from __future__ import annotations

from deft_tvm.spec import AttentionSpec


def score_products(spec: AttentionSpec) -> dict[str, tuple[int, str | None]]:
    """The products of queries with keys: their depth, and what is asked for ahead beside them.

    Where K lies inside V, it comes with V, beside the output's product.
    """
    products: dict[str, tuple[int, str | None]] = {
        "scores": (spec.k_width, None if spec.tied else "ahead_k")
    }
    if spec.rope is not None:
        products["scores_rope"] = (spec.rope_width, "ahead_rope")
    return products


def load_widths(spec: AttentionSpec) -> dict[str, int]:
    """The blocks that fill a tile from rows in memory, and the elements of a row."""
    widths = {"load_q": spec.k_width, "load_v": spec.v_width}
    if not spec.tied:
        widths["load_k"] = spec.k_width
    if spec.rope is not None:
        widths |= {"load_q_rope": spec.rope_width, "load_rope": spec.rope_width}
    return widths

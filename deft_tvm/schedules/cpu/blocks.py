"""The partial kernel's blocks that fetch, by what a CPU's schedule does with them."""

from __future__ import annotations

from deft_tvm.spec import AttentionSpec


def asked_beside(spec: AttentionSpec, product: str) -> str | None:
    """What is asked of memory ahead, beside a product of queries with keys.

    Where K lies inside V, it comes with V, beside the output's product.
    """
    return {"scores": None if spec.tied else "ahead_k", "scores_rope": "ahead_rope"}[product]


def query_widths(spec: AttentionSpec) -> dict[str, int]:
    """The blocks that load an item's queries, and the elements of a row."""
    widths = {"load_q": spec.k_width}
    return widths if spec.rope is None else widths | {"load_q_rope": spec.rope_width}


def load_widths(spec: AttentionSpec) -> dict[str, int]:
    """The blocks that fill a tile of tokens from memory, and the elements of a token."""
    widths = {"load_v": spec.v_width}
    if not spec.tied:
        widths["load_k"] = spec.k_width
    return widths if spec.rope is None else widths | {"load_rope": spec.rope_width}

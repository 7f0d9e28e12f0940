"""Which of the partial kernel's blocks there are for a spec, whatever schedules them."""

from __future__ import annotations

from deft_tvm.spec import AttentionSpec


def score_products(spec: AttentionSpec) -> dict[str, int]:
    """The products of queries with keys, and the depth of each."""
    products = {"scores": spec.k_width}
    return products if spec.rope is None else products | {"scores_rope": spec.rope_width}


def matrices_of_softmax(spec: AttentionSpec) -> tuple[str, ...]:
    """What is made of the scores before it is rounded, one element after the other."""
    return ("exponentials", "weights") if spec.scaled else ("exponentials",)

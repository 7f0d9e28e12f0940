"""Passes of TVM's that the lowering of every target runs in the same order."""

from __future__ import annotations

from tvm import s_tir, tirx, transform


def tidy() -> list[transform.Pass]:
    """After loops have become vectors: unroll, and simplify what that leaves.

    TVM's own pipelines also hoist conditions out of loops and drop what does nothing. In these
    kernels that finds next to nothing, and took a quarter of a compilation (TVM 0.27, 2026-11-28).
    """
    lower = s_tir.transform
    return [
        tirx.transform.UnrollLoop(),
        lower.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        lower.RewriteUnsafeSelect(),
    ]

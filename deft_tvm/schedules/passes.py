"""Passes of TVM's that the lowering of every target runs in the same order."""

from __future__ import annotations

from tvm import s_tir, tirx, transform


def tidy() -> list[transform.Pass]:
    """After loops have become vectors: unroll, and simplify what that leaves.

    TVM's own pipelines also hoist conditions out of loops and look for what does nothing. The
    kernels have neither, and the looking took a quarter of a compilation.
    """
    lower = s_tir.transform
    return [
        tirx.transform.UnrollLoop(),
        lower.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        lower.RewriteUnsafeSelect(),
    ]

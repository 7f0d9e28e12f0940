"""Passes of TVM's that the lowering of every target runs in the same order."""

from __future__ import annotations

from tvm import s_tir, tirx, transform


def tidy() -> list[transform.Pass]:
    """After loops have become vectors: unroll, and drop what turned out to do nothing."""
    lower, simplify = s_tir.transform, tirx.transform.StmtSimplify
    return [
        lower.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        lower.RenormalizeSplitPattern(),
        simplify(),
        tirx.transform.RemoveNoOp(),
        lower.RewriteUnsafeSelect(),
    ]

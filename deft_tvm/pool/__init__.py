"""Branches that grow, split and are pruned, in the pages of a cache; integers only."""

from __future__ import annotations

from deft_tvm.pool.pool import ROOT, PagePool

__all__ = ["ROOT", "PagePool"]

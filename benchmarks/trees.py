# python benchmarks/trees.py
"""The other families: tree of thoughts, drafts, beams, a mixed batch."""

from beside_sdpa import compare

for workload in ("multi_step", "speculative:nodes=64,context=4000", "beam", "forest"):
    compare(workload)

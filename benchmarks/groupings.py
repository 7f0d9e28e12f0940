# python benchmarks/groupings.py
"""What the plan is worth: the groupings of the DeFT paper, no sharing at all, and ours."""

from beside_sdpa import compare

from deft_tvm.plan import GROUPINGS

for grouping in GROUPINGS:
    compare("few_shot", "--peers", "", "--grouping", grouping)

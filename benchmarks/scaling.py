# python benchmarks/scaling.py
"""Cost against work: from 1k to 256k tokens, from 1 to 4,096 rows. A straight line is proportional.

Prints the milliseconds of one step, plan and merge included, and draws them beside the records.
"""

from __future__ import annotations

import torch
from record import folder

from deft_tvm import AttentionSpec, TreeAttention
from deft_tvm.bench import plot
from deft_tvm.bench.step import OURS, step
from deft_tvm.timing import measure
from deft_tvm.workloads import parse, tensors

TOKENS = [1024 << n for n in range(9)]
ROWS = [1 << n for n in range(13)]
PROMPT = 4096
BUDGET = 0.5


def milliseconds(attention: TreeAttention, workload: str) -> float:
    """The median of one step with caches emptied."""
    case = tensors(parse(workload).forest, attention.spec)
    cold = 2 * attention.profile.l3_bytes
    with torch.inference_mode():
        calls = {OURS: step(case, attention)}
        return 1e3 * measure(calls, budget=BUDGET, warmup=1, cold_bytes=cold)[OURS].median


if __name__ == "__main__":
    by_tokens, by_rows = [], []
    for dtype in ("float32", "bfloat16"):
        attention = TreeAttention(
            AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128, dtype=dtype)
        )
        for rows in (1, 32):
            shape = "few_shot:prompt={},branches={},tokens=1"
            found = [milliseconds(attention, shape.format(tokens, rows)) for tokens in TOKENS]
            by_tokens.append(plot.Line(f"{dtype}, rows: {rows}", TOKENS, found))
        found = [
            milliseconds(attention, f"few_shot:prompt={PROMPT},branches={rows},tokens=1")
            for rows in ROWS
        ]
        by_rows.append(plot.Line(f"{dtype}, tokens: {PROMPT}", ROWS, found))
    for unit, curves in (("tokens", by_tokens), ("rows", by_rows)):
        for curve in curves:
            print(f"\n{curve.name}")
            for work, time in zip(curve.x, curve.y, strict=True):
                print(f"{work:8.0f} {unit} {time:10.3f} ms {1e3 * time / work:10.3f} µs each")
    panels = (("tokens in the cache", by_tokens), ("rows over one prompt", by_rows))
    plot.lines(panels, "milliseconds", folder() / "scaling.svg", log=True)

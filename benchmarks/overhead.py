# python benchmarks/overhead.py
"""Microseconds of everything but attention: a run and a plan of one row over one token."""

from __future__ import annotations

import torch

from deft_tvm import AttentionSpec, Forest, TreeAttention
from deft_tvm.timing import measure
from deft_tvm.workloads import tensors

spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
case = tensors(Forest.from_parents([-1], [1]), spec)
attention = TreeAttention(spec)
attention.plan(case.forest, case.pages)
out, lse = attention.run(case.q, case.kv)

with torch.inference_mode():
    timings = measure(
        {
            "run": lambda: attention.run(case.q, case.kv, out, lse),
            "plan": lambda: attention.plan(case.forest, case.pages),
            "update": lambda: attention.update(case.forest),
            "torch.add(out=)": lambda: torch.add(lse, lse, out=lse),
        },
        warmup=50,
    )
for name, timing in timings.items():
    print(f"{name:16}{1e6 * timing.median:8.1f} µs")

# python benchmarks/planning.py
"""Milliseconds of planning: the families of workloads, and a forest of 10,000 nodes.

By the planner that the module brings along, and by the one in Python; and an update after growth.
"""

from __future__ import annotations

from functools import partial

from deft_tvm import AttentionSpec, TreeAttention
from deft_tvm.plan import make_recipe
from deft_tvm.timing import measure
from deft_tvm.workloads import FAMILIES, parse
from deft_tvm.workloads.tensors import shuffled_pages

spec = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
attention = TreeAttention(spec)
in_module, in_python = (
    make_recipe(spec, attention.artifact.tiles, attention.profile, planner=planner)
    for planner in (attention.artifact.planner, None)
)
for name in (*FAMILIES, "few_shot:branches=9999,tokens=16"):
    workload = parse(name)
    now = workload.forest
    grown = now.with_lengths(now.lengths + now.rows)
    pages = shuffled_pages(grown, spec)
    calls = {
        "plan": partial(in_module, now, pages),
        "update": partial(in_module(now, pages).update, grown, pages),
        "in Python": partial(in_python, now, pages),
    }
    timings = measure(calls, budget=0.5)
    times = "  ".join(f"{name} {1e3 * t.median:7.3f}" for name, t in timings.items())
    print(f"{times}  ms  {workload.name}")

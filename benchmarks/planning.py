# python benchmarks/planning.py
"""Milliseconds of planning: the families of workloads, and a forest of 10,000 nodes."""

from __future__ import annotations

from functools import partial

from deft_tvm import AttentionSpec, DeviceProfile
from deft_tvm.plan import make_plan
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.timing import measure
from deft_tvm.tuning.log import measured
from deft_tvm.workloads import FAMILIES, parse
from deft_tvm.workloads.tensors import shuffled_pages

spec = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
device = measured(DeviceProfile.detect())
tiles = default_tiles(spec, "llvm", frozenset(device.features))
for name in (*FAMILIES, "few_shot:branches=9999,tokens=16"):
    workload = parse(name)
    now = workload.forest
    grown = now.with_lengths(now.lengths + now.rows)
    pages = shuffled_pages(grown, spec)
    plan = partial(make_plan, now, pages, spec, tiles, device)
    made = plan()
    timings = measure({"plan": plan, "update": partial(made.update, grown, pages)}, budget=0.5)
    times = "  ".join(f"{name} {1e3 * t.median:7.3f}" for name, t in timings.items())
    print(f"{times}  ms  {workload.name}")

# python benchmarks/prices.py [FILE]
"""Which prices make the best plans on this GPU: every distinct plan of many choices is timed.

Without an argument, the choices whose plans were best in a file that an earlier run left; else
choices are timed and kept in the file, a line for each step. What a price is: `plan.cost.ON_CUDA`.
"""

import itertools
import json
import random
import statistics
import sys
from hashlib import sha256
from math import exp, log
from pathlib import Path
from typing import Any

import torch

from deft_tvm import workloads
from deft_tvm.bench.step import running
from deft_tvm.device import DeviceProfile
from deft_tvm.gpu_check import rotation
from deft_tvm.gpu_check.cells import SPEEDS
from deft_tvm.gpu_check.modules import build_missing
from deft_tvm.gpu_check.speeds import WORKLOADS
from deft_tvm.plan import cost
from deft_tvm.plan.layout import Plan
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec

RECORD = Path("logs/nvidia-h200-sm90a-132sm/benchmarks/prices.jsonl")
NAMES = ("few_share", "group_share", "unit_seconds", "launch_seconds")
GRID = (
    *((0.06, 0.1, 0.16, 0.25), (0.3, 0.45, 0.65)),
    *((3e-6, 4.5e-6, 6.5e-6, 9e-6, 13e-6, 18e-6), (2e-6, 5e-6, 10e-6)),
)
CHOICES = 72
SECONDS = 0.05
"""For the replays of one plan."""


def main() -> None:
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    lines = [json.loads(line) for line in Path(*sys.argv[1:] or [RECORD]).read_text().splitlines()]
    behind: dict[str, list[float]] = {}
    for line in lines:
        best = min(line["us"].values())
        for choice, plan in line["plans"].items():
            behind.setdefault(choice, []).append(line["us"][plan] / best)
    ranked = sorted((exp(statistics.fmean(map(log, f))), max(f), c) for c, f in behind.items())
    print(f"{len(lines)} steps, {len(ranked)} choices of {', '.join(NAMES)}")
    for mean, worst, choice in (*ranked[:8], *ranked[-2:]):
        print(
            f"{mean:.4f} times the best plan of {len(lines)} steps, at most {worst:.2f}: {choice}"
        )


def measure(file: Path) -> None:
    """A line for each step of each attention."""
    random.seed(1)
    choices = random.sample(list(itertools.product(*GRID)), CHOICES)
    rotation.SECONDS = SECONDS
    build_missing(SPEEDS, "cuda")
    with torch.inference_mode(), file.open("a") as out:
        for workload, spec in itertools.product(WORKLOADS, SPEEDS):
            line = timed(AttentionSpec.parse(spec), workload, choices)
            print(spec, workload, sorted(line["us"].values()), flush=True)
            print(json.dumps(line), file=out, flush=True)


def timed(spec: AttentionSpec, workload: str, choices: list[tuple[float, ...]]) -> dict[str, Any]:
    """The plan of each choice by its digest, and the microseconds of each plan."""
    device = DeviceProfile.detect("cuda")
    base = TreeAttention(spec, device="cuda")
    case = workloads.tensors(workloads.parse(workload).forest, spec, device="cuda")
    cases = rotation.rotated(case, rotation.count_of(case, device))
    plans: dict[str, str] = {}
    us: dict[str, float] = {}
    for choice in choices:
        cost.ON_CUDA.update(prices(choice))
        attention = TreeAttention(spec, base.artifact, "cuda")
        plan = digest(attention.plan(case.forest, case.pages))
        if plan not in us:
            seconds = rotation.seconds_of([running(each, attention) for each in cases], "cuda")
            us[plan] = round(1e6 * statistics.median(seconds), 3)
        plans[" ".join(f"{price:g}" for price in choice)] = plan
    return {"spec": str(spec), "workload": workload, "plans": plans, "us": us}


def prices(choice: tuple[float, ...]) -> dict[str, Any]:
    """As in `ON_CUDA`: shares are of the rates of 16 bits."""
    few, group, unit, launch = choice
    shares = {"few_share": few, "group_share": group}
    rates = {n: (("float32", 0.1), ("float16", s), ("bfloat16", s)) for n, s in shares.items()}
    return {**rates, "unit_seconds": unit, "launch_seconds": launch}


def digest(plan: Plan) -> str:
    return sha256(plan.items.tobytes() + repr(plan.launches).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()

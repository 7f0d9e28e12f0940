"""Logs whose times are known, for the tests of what compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deft_tvm.device import DeviceProfile
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tuning.lines import Policy, Run, Trial
from deft_tvm.tuning.log import TuningLog

SPEC = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=32, page_size=4)
DEVICE = DeviceProfile.nominal()
PASSES = (6,) * 12
ROUNDS = sum(PASSES)
VERSIONS = {"tvm": "0.27.0", "torch": "2.13.0"}


def run_line(name: str = "one", **fields: Any) -> Run:
    given: dict[str, Any] = {
        "run": name,
        "spec": str(SPEC),
        "device": DEVICE.slug,
        "name": "A processor",
        "features": DEVICE.features,
        "read_bandwidth": 3e10,
        "matrix_rate": DEVICE.matrix_rate,
        "policy": Policy(0.4, ROUNDS, len(PASSES), 64 << 20),
        "trials": 24,
        "commit": "abc1234",
        "versions": VERSIONS,
        "time": "2026-11-20T10:00:00+00:00",
    }
    return Run(**given | fields)


def trial_line(number: int, kernel: str, **fields: Any) -> Trial:
    given: dict[str, Any] = {
        "run": "one",
        "trial": number,
        "kernel": kernel,
        "spec": str(SPEC),
        "workload": "few_shot",
        "tile": TileShape(16, 64, "float32"),
        "decision": {"rows": 8},
        "status": "ok",
        "latency_us": (100.0,) if fields.get("status", "ok") == "ok" else (),
        "device": DEVICE.slug,
        "limit_us": 50.0,
        "commit": "abc1234",
        "versions": VERSIONS,
        "time": f"2026-11-20T10:{number // 60:02}:{number % 60:02}+00:00",
    }
    return Trial(**given | fields)


def noisy(
    median: float, seed: int, spread: float = 0.03, rounds: int = ROUNDS
) -> tuple[float, ...]:
    """Times around a median, in µs."""
    values = np.random.default_rng(seed).lognormal(np.log(median), spread, rounds)
    return tuple(float(value) for value in values.round(3))


def write_log(
    root: Path,
    medians: dict[str, float],
    *,
    seed: int = 0,
    slow_hour: float = 1.0,
    run: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """A log of one search trial and one final measurement of each kernel, with what was beside.

    Args:
        medians: µs of each kernel; its limit is 50 µs.
        slow_hour: by which all times of that hour are longer, those of the probes too.
        run, fields: of the lines.
    """
    spec = AttentionSpec.parse(fields.get("spec", str(SPEC)))
    device = fields.get("device", DEVICE.slug)
    log = TuningLog(root / device / spec.slug)
    log.append(run_line(**{"device": device, "spec": str(spec)} | (run or {})))
    for number, (kernel, median) in enumerate(medians.items()):
        given: dict[str, Any] = {
            "latency_us": noisy(slow_hour * median, 100 * seed + number),
            "anchor_us": noisy(slow_hour * 50.0, 1000 + 100 * seed + number, 0.01),
            "probe_us": {
                "product": noisy(slow_hour * 5000.0, 2000 + 100 * seed + number, 0.01),
                "read": noisy(slow_hour * 4000.0, 3000 + 100 * seed + number, 0.1),
            },
            "passes": PASSES,
        } | fields
        log.append(
            trial_line(2 * number, kernel, **fields | {"latency_us": given["latency_us"][:6]})
        )
        log.append(trial_line(2 * number + 1, kernel, final=True, **given))
    return root


def kernels(count: int) -> list[str]:
    return [f"r{16 * (number + 1)}t64f32" for number in range(count)]


def equal(count: int, median: float = 100.0) -> dict[str, float]:
    """So many kernels that take the same time."""
    return dict.fromkeys(kernels(count), median)

"""What a run writes of itself before its first trial."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone

from deft_tvm.device import DeviceProfile, driver
from deft_tvm.manifest import installed_versions, source_commit
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.lines import Policy, Run
from deft_tvm.tuning.passes import ALONE
from deft_tvm.tuning.runner import Runner
from deft_tvm.tuning.search import SEARCH_SECONDS
from deft_tvm.tuning.subject import cold_bytes


def new_run(
    spec: AttentionSpec,
    device: DeviceProfile,
    runner: Runner,
    workloads: Sequence[str],
    budget: Budget,
    seed: int,
    apart: float,
) -> Run:
    """Of this process, now."""
    passes = ALONE.passes[device.kind]
    return Run(
        run=_name(),
        spec=str(spec),
        device=device.slug,
        name=device.name,
        features=device.features,
        driver=driver() if device.kind == "cuda" else "",
        read_bandwidth=device.read_bandwidth,
        matrix_rate=device.matrix_rate,
        runner=runner.name,
        workloads=tuple(workloads),
        trials=budget.trials,
        minutes=budget.minutes,
        seed=seed,
        policy=Policy(
            SEARCH_SECONDS,
            passes * ALONE.rounds,
            passes,
            cold_bytes(device),
            apart=apart,
            huge_pages=device.kind == "cpu",
        ),
        commit=source_commit(),
        versions=installed_versions(),
    )


def _name() -> str:
    """Of no other run on any machine, so that logs can be merged."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.getpid()}-{secrets.token_hex(2)}"

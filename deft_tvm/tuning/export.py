"""A log for other tools: T4, the results schema that Kernel Tuner and its dashboards read.

One file for each kernel and workload, as a T4 file knows one kernel. Times are in ms. See
https://github.com/KernelTuner/kernel_tuner, ``kernel_tuner/schema/T4/1.0.0/results-schema.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath, write_whole
from deft_tvm.tuning.lines import Status, Trial
from deft_tvm.tuning.log import TuningLog, by_subject

T4_VERSION = "1.0.0"

INVALIDITY: dict[Status, str] = {
    "ok": "correct",
    "compile": "compile",
    "runtime": "runtime",
    "timeout": "timeout",
    "wrong": "correctness",
    "refused": "constraints",
    "lost": "runtime",
}
"""T4's word for each status."""


def export_t4(log: TuningLog, directory: AnyPath) -> list[Path]:
    """Write the trials of each kernel and workload into a file of the folder.

    Raises:
        LogError: there is no trial in it.
        OSError: the folder cannot be written.
    """
    trials = by_subject(log.read())
    if not trials:
        raise LogError(f"{log.directory} has no trial in it; expected a tuning log")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    names: Counter[str] = Counter()
    paths = []
    for (kernel, _), found in trials.items():
        names[kernel] += 1
        name = kernel if names[kernel] == 1 else f"{kernel}-{names[kernel]}"
        content = {"schema_version": T4_VERSION, "results": [_result(trial) for trial in found]}
        path = folder / f"{name}.t4.json"
        write_whole(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        paths.append(path)
    return paths


def _result(trial: Trial) -> dict[str, Any]:
    times: dict[str, Any] = {"runtimes": [us / 1e3 for us in trial.latency_us]}
    if trial.compile_s is not None:
        times["compilation_time"] = 1e3 * trial.compile_s
    return {
        "timestamp": trial.time,
        "configuration": trial.decision,
        "objectives": ["time"],
        "times": times,
        "invalidity": INVALIDITY[trial.status],
        "correctness": float(trial.status == "ok"),
        "measurements": list(_measurements(trial)),
    }


def _measurements(trial: Trial) -> Iterator[dict[str, Any]]:
    if trial.status == "ok":
        yield {"name": "time", "value": trial.median_us / 1e3, "unit": "ms"}
    if trial.limit_us is not None:
        yield {"name": "limit", "value": trial.limit_us / 1e3, "unit": "ms"}
    if trial.max_error is not None:
        yield {"name": "max_error", "value": trial.max_error, "unit": ""}
    for name in ("kernel", "workload", "spec", "device", "run"):
        yield {"name": name, "value": getattr(trial, name), "unit": ""}

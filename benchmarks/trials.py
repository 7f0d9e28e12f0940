# python benchmarks/trials.py
"""What tuning is worth: the best so far of each kernel in this device's logs, against trials."""

from __future__ import annotations

import statistics
from itertools import accumulate
from pathlib import Path

from record import folder as records

from deft_tvm.bench import plot
from deft_tvm.tuning.log import TuningLog


def curves(folder: Path) -> list[plot.Line]:
    """For each kernel of one log, its best latency so far in parts of its default's."""
    by_kernel: dict[str, list[float]] = {}
    default = {}
    for trial in TuningLog(folder).read():
        if not trial.latency_us or trial.final:
            continue
        median = statistics.median(trial.latency_us)
        by_kernel.setdefault(trial.kernel, []).append(median)
        if trial.default:
            default[trial.kernel] = median
    lines = []
    for kernel, found in by_kernel.items():
        best = [each / default[kernel] for each in accumulate(found, min)]
        lines.append(plot.Line(kernel, range(1, len(best) + 1), best))
    return lines


if __name__ == "__main__":
    logs = sorted(path.parent for path in records().parent.glob("*/trials.jsonl"))
    panels = []
    for folder in logs:
        lines = curves(folder)
        panels.append((f"trials, {folder.name.partition('-page')[0]}", lines))
        for line in lines:
            print(
                f"{folder.name}  {line.name:14} {len(line.y):3} trials  {line.y[-1]:.3f} of default"
            )
    plot.lines(panels, "best so far, in parts of the default", records() / "trials.svg")

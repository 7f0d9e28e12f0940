# python benchmarks/tuned.py
"""What tuning is worth: each winner in this device's logs beside the default decision.

Both as they were measured in turn; how many times faster is told round by round.
"""

from __future__ import annotations

import math

from record import folder as records

from deft_tvm.compare.sources import Source, Tuned
from deft_tvm.timing import Summary


def speedup(tuned: Tuned) -> Summary | None:
    """Of the winner over the default; None where they were not measured together."""
    if tuned.in_turn is None:
        return None
    best, default = tuned.in_turn
    pairs = zip(default.latency_us, best.latency_us, strict=True)
    return Summary.of(tuple(other / own for other, own in pairs))


def changed(tuned: Tuned) -> str:
    """Choices in which the winner differs from the default."""
    assert tuned.in_turn is not None
    best, default = (trial.decision for trial in tuned.in_turn)
    found = [f"{n} {default.get(n)} → {v}" for n, v in best.items() if v != default.get(n)]
    return ", ".join(found) or "the default"


if __name__ == "__main__":
    tuned = Source.read(records().parent).tuned
    found = {subject: gain for subject in tuned if (gain := speedup(tuned[subject]))}
    for subject, gain in found.items():
        spec, kernel, workload = subject
        interval = f"{gain.low:.3f} … {gain.high:.3f}"
        print(
            f"{spec.partition(',page')[0]:52} {kernel:14} {workload.partition(':')[0]:12} "
            f"{gain.median:6.3f}×  {interval:16} {changed(tuned[subject])}"
        )
    mean = math.exp(sum(math.log(gain.median) for gain in found.values()) / len(found))
    specs = {subject.spec for subject in found}
    slower = sum(gain.high < 1 for gain in found.values())
    print(
        f"{len(found)} kernels of {len(specs)} specs: geometric mean {mean:.3f}×, {slower} slower"
    )

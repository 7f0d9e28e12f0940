"""How a search came to its best: against trials, and against time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

from deft_tvm.compare.sources import Tuned
from deft_tvm.tuning.lines import Trial

NEAR = 1.05
"""Within 5 % of its best a search has all but arrived."""


@dataclass(frozen=True)
class Convergence:
    """One subject's search.

    Attributes:
        best_us: the lowest median after each trial, from the first that worked on.
        minutes: spent tuning this log until that trial, pauses between runs left out.
        to_near: trials until `NEAR` its best; None if nothing worked.
        minutes_to_near: the same in time.
        failures: trials that did not work, by how they ended.
    """

    best_us: tuple[float, ...]
    minutes: tuple[float, ...]
    to_near: int | None
    minutes_to_near: float | None
    failures: dict[str, int]


def convergence(tuned: Tuned) -> Convergence:
    """Of all trials of the search, the final ones left out."""
    searched = [trial for trial in tuned.trials if not trial.final]
    lowest = list(accumulate((trial.median_us for trial in searched), min))
    minutes = _minutes(searched, tuned)
    arrived = [us <= NEAR * lowest[-1] < float("inf") for us in lowest]
    first = arrived.index(True) if True in arrived else None
    statuses: Counter[str] = Counter(trial.status for trial in searched if trial.status != "ok")
    return Convergence(
        tuple(lowest),
        tuple(minutes),
        None if first is None else first + 1,
        None if first is None else minutes[first],
        dict(statuses),
    )


def _minutes(trials: Sequence[Trial], tuned: Tuned) -> list[float]:
    """Of each run its own time, one run after the other."""
    began: dict[str, datetime] = {}
    before, last_run = 0.0, ""
    spent: list[float] = []
    for trial in trials:
        at = datetime.fromisoformat(trial.time)
        if trial.run not in began:
            run = tuned.runs.get(trial.run)
            began[trial.run] = datetime.fromisoformat(run.time) if run else at
        if last_run not in ("", trial.run):
            before = spent[-1]
        last_run = trial.run
        spent.append(before + (at - began[trial.run]).total_seconds() / 60)
    return spent

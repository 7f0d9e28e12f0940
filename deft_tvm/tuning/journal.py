"""What a run writes down and tells: the log first, then MetaSchedule's database, then the listener.

Trials are recorded one by one as they end. (MetaSchedule's own scheduler hands over results a batch
at a time, which a kill would lose.)
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from tvm.s_tir import meta_schedule as ms

from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.database import Database
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.lines import Run, Trial
from deft_tvm.tuning.log import TuningLog
from deft_tvm.tuning.messages import Outcome
from deft_tvm.tuning.result import Listener, Phase, Progress


class Journal:
    """Of one run into one log, which nobody else writes meanwhile.

    Args:
        log: where lines go.
        run: the first of them.
        kernels: what is tuned.
        budget: of the search.
        listener: told of every trial.

    Attributes:
        new_trials: recorded so far, final ones and those that the schedule declined not counted.
    """

    def __init__(
        self,
        log: TuningLog,
        run: Run,
        kernels: Sequence[Kernel],
        budget: Budget,
        listener: Listener,
    ) -> None:
        self.log, self.run, self.kernels = log, run, kernels
        self.budget, self.listener = budget, listener
        self.new_trials = 0
        self._lines = len(log.read())
        log.append(run)
        self._database = Database(log.directory)
        for kernel in kernels:
            self._complete_database(kernel)

    def _complete_database(self, kernel: Kernel) -> None:
        """Add what an earlier run had no time to."""
        space, tried = kernel.space, kernel.tried
        for number in self._database.missing(space, tried.keys() - kernel.refused):
            self._database.add(space, space.candidate(number), tried[number])

    @property
    def made(self) -> int:
        """Trials in the log."""
        return sum(len(kernel.tried) for kernel in self.kernels)

    def refused(self, kernel: Kernel, number: int, error: str) -> None:
        """The schedule declines a decision."""
        self._write(kernel, number, Outcome("refused", error=error))

    def tried(
        self, kernel: Kernel, number: int, candidate: ms.MeasureCandidate, outcome: Outcome
    ) -> None:
        """A trial of the search has ended."""
        self._write(kernel, number, outcome)
        if number in kernel.tried:
            self._database.add(kernel.space, candidate, kernel.tried[number])
            self.new_trials += 1
        best = f"best {kernel.best_us:.0f} µs" if kernel.best_us else "none works yet"
        self.tell("search", f"{kernel.name}: {outcome.status}, {best}", kernel, outcome)

    def final(
        self, kernel: Kernel, number: int, passes: Sequence[Outcome], alone: bool = False
    ) -> None:
        """A finalist was measured again, once in each pass; those that lost the machine are not
        missed."""
        kept = [outcome for outcome in passes if outcome.status != "lost"] or passes
        self._write(kernel, number, _joined(kept), True, alone, _rounds(kept))

    def _write(
        self,
        kernel: Kernel,
        number: int,
        outcome: Outcome,
        final: bool = False,
        alone: bool = False,
        passes: tuple[int, ...] = (),
    ) -> None:
        subject = kernel.space.subject
        trial = Trial(
            run=self.run.run,
            trial=self._lines,
            kernel=kernel.name,
            spec=subject.spec,
            workload=subject.workload,
            tile=subject.tile,
            decision=kernel.space[number],
            status=outcome.status,
            latency_us=outcome.latency_us,
            anchor_us=outcome.anchor_us,
            probe_us=outcome.probe_us,
            limit_us=kernel.limit_us,
            compile_s=outcome.compile_s,
            max_error=outcome.max_error,
            error=outcome.error,
            best_us=_lowest(kernel.best_us, outcome),
            default=number == kernel.space.start,
            final=final,
            alone=alone,
            passes=passes,
            commit=self.run.commit,
            versions=self.run.versions,
            device=subject.device.slug,
        )
        self.log.append(trial)
        self._lines += 1
        kernel.trials.append(trial)

    def tell(self, phase: Phase, text: str, kernel: Kernel, outcome: Outcome | None = None) -> None:
        made = self.made
        statuses = Counter(trial.status for k in self.kernels for trial in k.trials)
        self.listener(
            Progress(
                phase,
                text,
                made,
                self.budget.trials or sum(len(kernel.space) for kernel in self.kernels),
                self.run.spec,
                kernel.name,
                outcome.status if outcome else None,
                kernel.best_us,
                kernel.gain,
                kernel.limit_us,
                {status: count for status, count in statuses.items() if status != "ok"},
                self.budget.seconds_left(made, self.new_trials),
            )
        )


def _lowest(so_far: float | None, outcome: Outcome) -> float | None:
    own = statistics.median(outcome.latency_us) if outcome.latency_us else None
    lowest = min((us for us in (so_far, own) if us is not None), default=None)
    return None if lowest is None else round(lowest, 3)


def _rounds(passes: Iterable[Outcome]) -> tuple[int, ...]:
    return tuple(len(outcome.latency_us) for outcome in passes)


def _joined(passes: Sequence[Outcome]) -> Outcome:
    """All passes as one measurement; the first that failed speaks for all."""
    failed = next((outcome for outcome in passes if outcome.status != "ok"), None)
    if failed is not None:
        return failed
    errors = [outcome.max_error for outcome in passes if outcome.max_error is not None]
    return Outcome(
        "ok",
        _all(outcome.latency_us for outcome in passes),
        _all(outcome.anchor_us for outcome in passes),
        {n: _all(outcome.probe_us[n] for outcome in passes) for n in passes[0].probe_us},
        passes[0].compile_s,
        max(errors, default=None),
    )


def _all(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(parts))

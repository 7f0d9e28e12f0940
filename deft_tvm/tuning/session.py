"""One run of the tuner over the kernels of a spec: what was tried, what is next, what is written.

Trials are recorded one by one as they end, the log before MetaSchedule's database. (MetaSchedule's
own scheduler hands over results a batch at a time, which a kill would lose.)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.s_tir import meta_schedule as ms

from deft_tvm.manifest import installed_versions, source_commit
from deft_tvm.schedules import schedule
from deft_tvm.tuning.budget import allot
from deft_tvm.tuning.database import Database
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.log import Trial, TuningLog
from deft_tvm.tuning.messages import Outcome, brief
from deft_tvm.tuning.result import Listener, Phase, Progress
from deft_tvm.tuning.runner import Runner
from deft_tvm.tuning.search import GreedySearch, new_cost_model, runner_result

BATCH = 4
SEARCH_SECONDS = 0.4
"""Of timing one candidate in the search."""

FINAL_ROUNDS = 15
FINAL_SECONDS = 20.0
"""Most seconds of timing the finalists of one kernel."""


@dataclass(eq=False)
class Session:
    """Tunes kernels into a log.

    Attributes:
        run: a name that all its trials carry.
        log: where they go; no one else may write it.
        runner: where candidates are compiled and timed.
        kernels: what is tuned.
        trials: that the log shall hold of these kernels.
        listener: told of every trial.
        seed: of the search.
        new_trials: trials made so far, final ones not counted.
    """

    run: str
    log: TuningLog
    runner: Runner
    kernels: Sequence[Kernel]
    trials: int
    listener: Listener
    seed: int = 0
    new_trials: int = 0
    _lines: int = 0
    _common: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lines = len(self.log.read())
        self._common = {
            "run": self.run,
            "commit": source_commit(),
            "versions": installed_versions(),
        }
        self._database = Database(self.log.directory)
        self._cost_model = new_cost_model()
        for kernel in self.kernels:
            self._prepare(kernel)

    def _prepare(self, kernel: Kernel) -> None:
        def refuse(number: int, error: str) -> None:
            self._record(kernel, number, Outcome("refused", error=brief(error)))

        space, tried = kernel.space, kernel.tried
        kernel.search = GreedySearch(space, tried, refuse, self.seed)
        kernel.context = space.context(kernel.search)
        for number in self._database.missing(space, tried.keys() - kernel.refused):
            self._database.add(space, space.candidate(number), tried[number])

    @property
    def made(self) -> int:
        """Trials in the log."""
        return sum(len(kernel.tried) for kernel in self.kernels)

    def search(self) -> None:
        """Try the default of every kernel, then go on where most of the time is spent."""
        for kernel in self.kernels:
            if kernel.space.start not in kernel.tried and self.made < self.trials:
                self._search(kernel, 1)
        known = {kernel: kernel.default_us or kernel.best_us for kernel in self.kernels}
        most = max((us for us in known.values() if us), default=1.0)
        # A kernel for which nothing works yet is as urgent as the slowest.
        weights = {kernel: us or most for kernel, us in known.items()}
        further = allot(
            self.trials,
            weights,
            made={kernel: len(kernel.tried) for kernel in self.kernels},
            most={kernel: len(kernel.space) for kernel in self.kernels},
        )
        for kernel in sorted(further, key=lambda kernel: -weights[kernel]):
            if further[kernel]:
                self._search(kernel, further[kernel])

    def _search(self, kernel: Kernel, trials: int) -> None:
        kernel.context.pre_tuning(trials, BATCH, [], None, self._cost_model)
        while candidates := kernel.context.generate_measure_candidates():
            proposed = zip(kernel.search.proposed, candidates, strict=True)
            results = [self._try(kernel, number, candidate) for number, candidate in proposed]
            kernel.context.notify_runner_results(candidates, results)
        kernel.context.post_tuning()

    def _try(
        self, kernel: Kernel, number: int, candidate: ms.MeasureCandidate
    ) -> ms.runner.RunnerResult:
        subject = kernel.space.subject
        outcome = self.runner.time([candidate.sch.mod], subject, SEARCH_SECONDS)[0]
        self._record(kernel, number, outcome)
        self._database.add(kernel.space, candidate, kernel.tried[number])
        self.new_trials += 1
        best = f"best {kernel.best_us:.0f} µs" if kernel.best_us else "none works yet"
        self._tell("search", f"{kernel.name}: {outcome.status}, {best}", kernel, outcome)
        return runner_result(kernel.tried[number])

    def settle(self) -> None:
        """Measure the best decisions again, in turn with the default, as they will be shipped."""
        for kernel in self.kernels:
            if not kernel.settled:
                self._tell("final", f"{kernel.name}: measuring the best again", kernel)
                self._settle(kernel)

    def _settle(self, kernel: Kernel) -> None:
        numbers = kernel.finalists()
        once = sum(statistics.median(kernel.tried[number]) for number in numbers)
        outcomes = self.runner.time(
            [schedule(kernel.space.task, kernel.space[number])[0].mod for number in numbers],
            kernel.space.subject,
            min(FINAL_SECONDS, FINAL_ROUNDS * (once + 0.02 * len(numbers))),
        )
        for number, outcome in zip(numbers, outcomes, strict=True):
            self._record(kernel, number, outcome, final=True)

    def _record(self, kernel: Kernel, number: int, outcome: Outcome, final: bool = False) -> None:
        subject = kernel.space.subject
        trial = Trial(
            **self._common,
            trial=self._lines,
            kernel=kernel.name,
            spec=subject.spec,
            workload=subject.workload,
            tile=subject.tile,
            decision=kernel.space[number],
            status=outcome.status,
            latency_us=outcome.latency_us,
            compile_s=outcome.compile_s,
            max_error=outcome.max_error,
            error=outcome.error,
            best_us=_lowest(kernel.best_us, outcome),
            default=number == kernel.space.start,
            final=final,
            device=subject.device.slug,
        )
        self.log.append(trial)
        self._lines += 1
        kernel.trials.append(trial)

    def _tell(
        self, phase: Phase, text: str, kernel: Kernel, outcome: Outcome | None = None
    ) -> None:
        self.listener(
            Progress(
                phase,
                text,
                self.made,
                self.trials,
                kernel.name,
                outcome.status if outcome else None,
                kernel.best_us,
                kernel.default_us,
            )
        )


def _lowest(so_far: float | None, outcome: Outcome) -> float | None:
    own = statistics.median(outcome.latency_us) if outcome.latency_us else None
    lowest = min((us for us in (so_far, own) if us is not None), default=None)
    return None if lowest is None else round(lowest, 3)

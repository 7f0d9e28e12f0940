"""The search of one run: default decisions first, then where most of the time is spent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tvm.s_tir import meta_schedule as ms

from deft_tvm.tuning.budget import Budget, allot
from deft_tvm.tuning.journal import Journal
from deft_tvm.tuning.kernel import Kernel
from deft_tvm.tuning.messages import Outcome, brief
from deft_tvm.tuning.runner import Runner
from deft_tvm.tuning.strategy import GreedySearch, new_cost_model, runner_result

BATCH = 4
SEARCH_SECONDS = 0.4
"""Of timing one candidate in the search."""

Candidates = Sequence[tuple[int, ms.MeasureCandidate]]
"""Decisions by number, as the search proposes them."""


class Search:
    """Tries decisions of kernels until the budget is spent.

    Args:
        journal: where trials are written.
        runner: where candidates are compiled and timed.
        seed: of the search.
    """

    def __init__(self, journal: Journal, runner: Runner, seed: int) -> None:
        self.journal, self.runner = journal, runner
        self._cost_model = new_cost_model()
        for kernel in journal.kernels:
            self._prepare(kernel, seed)

    def _prepare(self, kernel: Kernel, seed: int) -> None:
        def refuse(number: int, error: str) -> None:
            self.journal.refused(kernel, number, brief(error))

        kernel.search = GreedySearch(kernel.space, kernel.tried, refuse, seed)
        kernel.context = kernel.space.context(kernel.search)

    @property
    def budget(self) -> Budget:
        return self.journal.budget

    def run(self) -> None:
        """Until the budget is spent or every decision tried."""
        kernels, made = self.journal.kernels, self.journal.made
        for kernel in kernels:
            if kernel.space.start not in kernel.tried and made < self.budget.goal(made):
                self._search(kernel, 1)
                made = self.journal.made
        while further := self._further():
            for kernel, trials in further.items():
                self._search(kernel, trials)

    def _further(self) -> dict[Kernel, int]:
        """Trials that kernels get next, the slowest first; none once the search is over."""
        kernels = self.journal.kernels
        if self.budget.late:
            return {}
        known = {kernel: kernel.default_us or kernel.best_us for kernel in kernels}
        most = max((us for us in known.values() if us), default=1.0)
        # A kernel for which nothing works yet is as urgent as the slowest.
        weights = {kernel: us or most for kernel, us in known.items()}
        further = allot(
            self.budget.goal(self.journal.made),
            weights,
            made={kernel: len(kernel.tried) for kernel in kernels},
            most={kernel: len(kernel.space) for kernel in kernels},
        )
        slowest_first = sorted(further, key=lambda kernel: -weights[kernel])
        return {kernel: further[kernel] for kernel in slowest_first if further[kernel]}

    def _search(self, kernel: Kernel, trials: int) -> None:
        batch = max(BATCH, self.runner.width)
        kernel.context.pre_tuning(trials, batch, [], None, self._cost_model)
        while not self.budget.late and (candidates := kernel.context.generate_measure_candidates()):
            self._try(kernel, list(zip(kernel.search.proposed, candidates, strict=True)))
            results = [runner_result(kernel.tried.get(n, ())) for n in kernel.search.proposed]
            kernel.context.notify_runner_results(candidates, results)
        kernel.context.post_tuning()

    def _try(self, kernel: Kernel, candidates: Candidates) -> None:
        """Measure as many at once as the runner can; record each before another begins.

        One that was lost with its machine is measured again, until `Kernel.tried` blames it. Once
        the time is over, no other one begins.
        """
        by_number, waiting = dict(candidates), deque(number for number, _ in candidates)
        running: dict[Future[Outcome], int] = {}
        pool = ThreadPoolExecutor(self.runner.width)
        try:
            while running or (waiting and not self.budget.late):
                while waiting and len(running) < self.runner.width and not self.budget.late:
                    number = waiting.popleft()
                    running[self._begin(pool, kernel, by_number[number])] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    self.journal.tried(kernel, number, by_number[number], future.result())
                    if number not in kernel.tried:
                        waiting.append(number)
        finally:
            # Not waiting: after Ctrl-C a candidate may go on until its process is ended.
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, kernel: Kernel, candidate: ms.MeasureCandidate
    ) -> Future[Outcome]:
        subject, modules = kernel.space.subject, [candidate.sch.mod]
        return pool.submit(lambda: self.runner.time(modules, subject, SEARCH_SECONDS)[0])

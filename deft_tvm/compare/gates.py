"""When a comparison counts as failed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deft_tvm.compare.comparison import Comparison, Verdict
from deft_tvm.errors import InputError


@dataclass(frozen=True)
class Gates:
    """What is refused.

    Attributes:
        regression: a row that is surely slower, and by more than this part; None: any may be.
        geomean: a geometric mean that is surely slower, and by more than this part.
        missing: a row of the first log that the second has not, or that failed there.
    """

    regression: float | None = None
    geomean: float | None = None
    missing: bool = False

    @classmethod
    def parse(cls, regression: str | None, others: Iterable[str] = ()) -> Gates:
        """From ``5%`` and any of ``missing``, ``geomean:2%``.

        Raises:
            InputError: it is neither.
        """
        geomean, missing = None, False
        for other in others:
            name, _, value = other.partition(":")
            if other == "missing":
                missing = True
            elif name == "geomean" and value:
                geomean = _part("--fail-on geomean", value)
            else:
                raise InputError(f"--fail-on is {other!r}; expected missing or geomean:2%")
        return cls(
            None if regression is None else _part("--fail-on-regression", regression),
            geomean,
            missing,
        )

    def failures(self, found: Comparison) -> list[str]:
        """A sentence for each gate that is not passed. Across devices nothing is a regression."""
        return [*self._rows(found), *self._mean(found), *self._missing(found)]

    def _rows(self, found: Comparison) -> Iterator[str]:
        if self.regression is None:
            return
        for row in found.rows:
            slower = row.surely_slower_by
            if slower > self.regression:
                yield (
                    f"{row.subject.kernel} on {row.subject.workload} is {slower:.1%} slower; "
                    f"expected {100 * self.regression:g}% or less"
                )

    def _mean(self, found: Comparison) -> Iterator[str]:
        slower, most = found.surely_slower_by, self.geomean
        if most is not None and slower > most:
            yield f"the geometric mean is {slower:.1%} slower; expected {100 * most:g}% or less"

    def _missing(self, found: Comparison) -> Iterator[str]:
        if self.missing:
            for row in found.having(Verdict.ONLY_BEFORE, Verdict.FAILED):
                if row.after is not None and row.after.best is not None:
                    continue  # it is A that has none
                yield f"{row.subject.kernel} on {row.subject.workload} has no time in B"


def _part(name: str, text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if found is None:
        raise InputError(f"{name} is {text!r}; expected percent, as in 5%")
    return float(found[1]) / 100

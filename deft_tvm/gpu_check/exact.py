"""``python -m deft_tvm.gpu_check.exact``: attentions on all kinds of trees beside float64.

A line for each, as soon as it is known; exits with 1 if one is further away than rounding explains,
cannot be run, or had no time.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from deft_tvm.check import Exactness
from deft_tvm.cli import end_with_code
from deft_tvm.gpu_check.arguments import deadline, file_in, kind_of, only, parser_of, use_logs
from deft_tvm.gpu_check.cells import CELLS, WORKLOADS, Check, forest_of
from deft_tvm.gpu_check.lines import Lines, go_on_elsewhere
from deft_tvm.gpu_check.modules import build_missing
from deft_tvm.gpu_check.ways import ON_GPUS_ALONE, WAYS
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec

T = TypeVar("T")

FILE = "exact.jsonl"


class Checked(msgspec.Struct, frozen=True):
    """What came of a cell.

    Attributes:
        cell: which.
        found: how near it is; None where it could not be run.
        error: why not.
    """

    cell: Check
    found: Exactness | None = None
    error: str = ""

    @property
    def holds(self) -> bool:
        return self.found is not None and self.found.holds

    def __str__(self) -> str:
        told = self.error if self.found is None else str(self.found)
        return f"{'exact' if self.holds else 'WRONG'} {self.cell}: {told}"


def main(specs: Sequence[str] | None = None, workloads: Sequence[str] = WORKLOADS) -> None:
    """All cells, or every one of some attentions on every workload."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="cells with this in their name")
    asked = parser.parse_args()
    use_logs(asked)
    left, kind = deadline(asked), kind_of(asked)
    given = [Check(spec, workload) for spec in specs or () for workload in workloads]
    possible = [
        cell
        for cell in (CELLS if specs is None else given)
        if not (kind == "cpu" and cell.way in ON_GPUS_ALONE)
    ]
    cells = [cell.canonical for cell in only(asked, possible)]
    lines: Lines[Checked] = Lines(file_in(asked, FILE), Checked, asked.again)
    last = {line.cell: line for line in lines.found}
    todo = [c for c in cells if c not in last or not (asked.go_on or last[c].holds)]
    unbuilt = build_missing((cell.spec for cell in todo), kind)
    for line in results(todo, kind, unbuilt):
        last[line.cell] = lines.add(line)
        print(line, flush=True)
        if not line.holds:
            go_on_elsewhere(asked, left, ["--only", asked.only])
        if left() <= 0:
            break
    undone = sum(cell not in last for cell in cells)
    wrong = sum(not last[cell].holds for cell in cells if cell in last)
    if undone:
        print(f"{undone} had no time; the same command goes on with them")
    print(f"{wrong} of {len(cells)} are not exact")
    sys.exit(1 if wrong or undone else 0)


def results(
    cells: Iterable[Check], device: str, unbuilt: dict[str, str] | None = None
) -> Iterator[Checked]:
    """What comes of each cell.

    Args:
        cells: in canonical form; those of one attention are best neighbours, whose module is
            loaded once.
        device: ``cuda`` or ``cpu``.
        unbuilt: attentions that have no module, and why.
    """
    loaded: tuple[str, TreeAttention | str] | None = None
    for cell in cells:
        spec = AttentionSpec.parse(cell.spec)
        if loaded is None or loaded[0] != cell.spec:
            why = (unbuilt or {}).get(cell.spec)
            make = partial(TreeAttention, spec, device=device)
            loaded = cell.spec, why if why is not None else attempt(make)
        attention = loaded[1]
        found = attention if isinstance(attention, str) else attempt(partial(_run, attention, cell))
        yield Checked(cell, error=found) if isinstance(found, str) else Checked(cell, found)


def _run(attention: TreeAttention, cell: Check) -> Exactness:
    return WAYS[cell.way](attention, forest_of(cell.workload))


def attempt(call: Callable[[], T]) -> T | str:
    """What a call returns, or its traceback: the other attentions may still be right."""
    try:
        return call()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    end_with_code(main)

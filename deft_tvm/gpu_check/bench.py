"""``python -m deft_tvm.gpu_check.bench``: one step of ours beside its peers, and limits.

Ours first in all cells, then our kernels by DeFT's groupings, then the peers: what is cut short has
the first of them. A line of JSON for each, as soon as it is known.
"""

from __future__ import annotations

import gc
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from deft_tvm.bench.core import Cell
from deft_tvm.cli import end_with_code
from deft_tvm.device import DeviceProfile
from deft_tvm.gpu_check.arguments import (
    deadline,
    file_in,
    kind_of,
    number,
    only,
    parser_of,
    use_logs,
)
from deft_tvm.gpu_check.lines import Lines, go_on_elsewhere, last_line
from deft_tvm.gpu_check.measuring import Measuring, limited
from deft_tvm.gpu_check.modules import build_missing
from deft_tvm.gpu_check.rates import rates_here
from deft_tvm.gpu_check.speeds import FILE, PAPERS, Begun, Beside, Found, Ours, cells_of
from deft_tvm.gpu_check.table import report
from deft_tvm.peers import PEERS, QUICK

FLEX = "flex"
"""Compiles for each cell, half a minute each."""
SLOW = (*QUICK, "tvm")
TIRED = 2
"""After so many failures with an attention a peer is not tried with it again."""


def main(cells: Sequence[Cell] | None = None) -> None:
    """All cells, or those that are given."""
    asked = _parser().parse_args()
    if cells is None:
        cells = cells_of(asked.trees)
    cells = only(asked, cells, lambda cell: f"{cell.spec} {cell.workload}")
    with torch.inference_mode():
        done = Bench(asked).run(cells)
    sys.exit(0 if done else 1)


def _parser() -> ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="cells with this in attention and workload")
    parser.add_argument("--trees", action="append", default=[], help="a file of recorded trees")
    parser.add_argument("--peers", help="with commas between; by default all but flex")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, at the end")
    parser.add_argument("--no-groupings", action="store_true", help="leave out DeFT's groupings")
    parser.add_argument("--peer-seconds", type=number, default=150.0, help="for one peer in a cell")
    return parser


class Bench:
    """What is found, phase after phase.

    Args:
        asked: the command's options.
    """

    def __init__(self, asked: Namespace) -> None:
        use_logs(asked)
        self.asked, self.kind = asked, kind_of(asked)
        self.left = deadline(asked)
        self.lines: Lines[Any] = Lines(file_in(asked, FILE), Found, asked.again)
        # Of a process whose place this one takes failures are known already.
        self._known = 0 if asked.go_on else len(self.lines.found)
        self.told = {key for line in self.lines.found if (key := self._key(line))}
        self._open: tuple[Cell, Measuring] | None = None

    def run(self, cells: Sequence[Cell]) -> bool:
        """Whether everything had its time."""
        unbuilt = build_missing((cell.spec for cell in cells), self.kind)
        rates = rates_here(self.asked.out, DeviceProfile.detect(self.kind))
        self.lines.add(Begun.now(rates))
        peers = self._peers()
        if self.asked.flex:
            peers.append(FLEX)
        phases: list[tuple[str, ...]] = [("",)]
        if not self.asked.no_groupings:
            phases.append(PAPERS)
        # Those that are slow on a GPU come after all that may be the best one.
        phases.append(tuple(name for name in peers if name not in (*SLOW, FLEX)))
        phases.append(tuple(name for name in peers if name in SLOW))
        phases += [(FLEX,)] if FLEX in peers else []
        late = any(self._phase(names, cells) for names in phases if names)
        print(report(self.lines.found))
        for spec, why in unbuilt.items():
            print(f"no module for {spec}: {why}")
        if late:
            print("some had no time; the same command goes on with them")
        return not late and not unbuilt

    def _peers(self) -> list[str]:
        if self.asked.peers is None:
            return [name for name in PEERS if name != FLEX]
        return [name for name in self.asked.peers.split(",") if name]

    def _phase(self, names: Sequence[str], cells: Sequence[Cell]) -> bool:
        """Whether there was too little time for all `names` in all cells."""
        for cell in cells:
            for name in names:
                if (cell, name) in self.told or self._is_tired(cell, name):
                    continue
                if self.left() <= 0:
                    return True
                line = self.lines.add(self._attempt(cell, name))
                self.told.add((cell, name))
                print(_said(line), flush=True)
                if line.failed:
                    go_on_elsewhere(self.asked, self.left, self._options())
        self._close()
        return False

    def _attempt(self, cell: Cell, name: str) -> Ours | Beside:
        try:
            with limited(min(self.left(), self.asked.peer_seconds)):
                measuring = self._measuring(cell)
                if not name:
                    return measuring.ours()
                return measuring.grouped(name) if name in PAPERS else self._peer(measuring, name)
        except Exception as error:
            why = last_line(error)
            self._close()  # it may have taken the memory
            return Beside(cell=cell, name=name, failed=why) if name else Ours(cell=cell, failed=why)

    def _peer(self, measuring: Measuring, name: str) -> Beside:
        ours = (o for o in self.lines.found if isinstance(o, Ours) and o.cell == measuring.cell)
        exact = next((own.exactness for own in ours if own.exactness is not None), None)
        if exact is None or not exact.holds:
            return Beside(cell=measuring.cell, name=name, failed="ours is wrong or not there")
        return measuring.peer(name, exact.out_bound)

    def _measuring(self, cell: Cell) -> Measuring:
        """Of one cell at a time."""
        if self._open is None or self._open[0] != cell:
            self._close()
            self._open = cell, Measuring(cell, self.kind)
        return self._open[1]

    def _close(self) -> None:
        self._open = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _key(self, line: Found) -> tuple[Cell, str] | None:
        """Of what needs no second try."""
        if isinstance(line, Begun) or (line.failed and not self.asked.go_on):
            return None
        return line.cell, line.name if isinstance(line, Beside) else ""

    def _is_tired(self, cell: Cell, name: str) -> bool:
        """A peer that fails, and does not merely lack something, does so again."""
        failed = Counter(
            line.cell.spec
            for line in self.lines.found[self._known :]
            if isinstance(line, Beside) and line.name == name and "Error" in line.failed
        )
        return failed[cell.spec] >= TIRED

    def _options(self) -> list[str]:
        asked = self.asked
        options = ["--only", asked.only, "--peer-seconds", f"{asked.peer_seconds:g}"]
        options += [] if asked.peers is None else ["--peers", asked.peers]
        options += ["--flex"] if asked.flex else []
        options += ["--no-groupings"] if asked.no_groupings else []
        return options + [part for path in asked.trees for part in ("--trees", path)]


def _said(line: Ours | Beside) -> str:
    name = line.name if isinstance(line, Beside) else "ours"
    told = f"not timed: {line.failed}" if line.failed else f"{1e6 * line.median:.2f} µs"
    return f"{line.cell.spec} {line.cell.workload} {name}: {told}"


if __name__ == "__main__":
    end_with_code(main)

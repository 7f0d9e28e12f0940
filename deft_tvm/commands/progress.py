"""Tuning in sight: a live line where there is a terminal, a line per event elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from deft_tvm.tuning.result import Listener, Progress


@contextmanager
def shown(title: str) -> Iterator[Listener]:
    """A listener for `tuning.tune`, on standard error so that standard output can be piped."""
    out = Console(stderr=True, highlight=False)
    if out.is_terminal:
        yield from _live(title, out)
    else:
        out.print(f"{title}: importing the compiler", soft_wrap=True)
        yield lambda event: out.print(_line(event), soft_wrap=True, markup=False)


def _live(title: str, out: Console) -> Iterator[Listener]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20))
    with Bars(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=out) as bars:
        bar = bars.add_task(f"{title}: importing the compiler", total=None)

        def listen(event: Progress) -> None:
            text = f"{title}: {event.text}"
            bars.update(bar, description=text, completed=event.trial, total=event.trials or None)

        yield listen


def _line(event: Progress) -> str:
    count = f"[{event.trial}/{event.trials}] " if event.trials else ""
    return f"{count}{event.text}"

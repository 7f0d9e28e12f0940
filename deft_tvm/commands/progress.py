"""Long work in sight: a live line where there is a terminal, a line per event elsewhere.

All on standard error, so that standard output can be piped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

if TYPE_CHECKING:
    from deft_tvm.tuning.result import Listener, Progress


@contextmanager
def told() -> Iterator[Callable[[str], None]]:
    """A function to say with what a command is at, stage by stage."""
    out = Console(stderr=True, highlight=False)
    if out.is_terminal:
        # Nothing turns: a thread that draws would take time from what is being measured.
        with Live(console=out, auto_refresh=False, transient=True) as live:
            yield lambda text: live.update(Text(text), refresh=True)
    else:
        yield lambda text: out.print(text, soft_wrap=True, markup=False)


@contextmanager
def shown(title: str) -> Iterator[Listener]:
    """A listener for `tuning.tune`."""
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

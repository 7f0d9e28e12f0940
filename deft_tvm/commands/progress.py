"""Long work in sight: a live line where there is a terminal, a line per event elsewhere.

All on standard error, so that standard output can be piped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
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
        yield lambda event: out.print(line(event), soft_wrap=True, markup=False)


def _live(title: str, out: Console) -> Iterator[Listener]:
    bars = Bars(BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), auto_refresh=False)
    bar = bars.add_task("", total=None)

    def picture(event: Progress | None) -> Group:
        if event is None:
            return Group(Text(f"{title}: start"), bars, Text("importing the compiler"))
        return Group(Text(f"{event.spec or title}: {event.phase}"), bars, Text(line(event)))

    # Drawn by events alone, see `told`.
    with Live(picture(None), console=out, auto_refresh=False, transient=True) as live:
        live.refresh()

        def listen(event: Progress) -> None:
            bars.update(bar, completed=event.trial, total=event.trials or None)
            live.update(picture(event), refresh=True)

        yield listen


def line(event: Progress) -> str:
    """All that is known at one event, on one line."""
    count = f"[{event.trial}/{event.trials}] " if event.trials else ""
    return count + " · ".join([event.text, *_standing(event)])


def _standing(event: Progress) -> Iterator[str]:
    """The best so far beside the default and the limit, failures, and the time left."""
    if event.gain:
        yield f"{event.gain:.2f}× the default"
    if event.best_us and event.limit_us:
        yield f"{event.limit_us / event.best_us:.0%} of the limit"
    if event.failures:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(event.failures.items()))
        yield f"failed: {kinds}"
    if event.phase == "search" and event.seconds_left is not None:
        minutes, seconds = divmod(round(event.seconds_left), 60)
        yield f"{minutes}:{seconds:02} left"

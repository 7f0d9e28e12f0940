"""A comparison on a terminal, or as Markdown for a merge request."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deft_tvm.compare import words
from deft_tvm.compare.comparison import Comparison, Row

COLOURS = {"faster": "green", "slower": "red", "failed": "red"}


def text(found: Comparison) -> RenderableType:
    """For `rich.console.Console.print`."""
    return Group(*_parts(found))


def _parts(found: Comparison) -> Iterator[RenderableType]:
    for letter, source in (("A", found.before), ("B", found.after)):
        yield Text(f"{letter}", style="bold")
        for name, value in words.header(source):
            yield Text(f"  {name:<9} {value}")
    if found.differences:
        yield Text("\nTHE SURROUNDINGS DIFFER", style="bold yellow")
        for name, (one, other) in found.differences.items():
            yield Text(f"  {name:<9} {one}\n  {'':<9} {other}", style="yellow")
    for heading, rows in words.groups(found.rows):
        yield Text(f"\n{heading}", style="bold")
        yield _table(rows)
        for row in rows:
            yield from _details(row)
    yield Text(f"\n{words.summary(found)}", style="bold")
    for note in words.notes(found):
        yield Text(f"note: {note}")


def _table(rows: list[Row]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="")
    for place, column in enumerate(words.COLUMNS):
        made.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    for row in rows:
        *numbers, verdict = words.cells(row)
        made.add_row(*numbers, Text(verdict, style=COLOURS.get(verdict, "")))
    return made


def _details(row: Row) -> Iterator[Text]:
    """What changed, how each search came there, and how to measure it again."""
    yield Text(f"  {row.subject.kernel}, {row.subject.spec}")
    if changed := words.changed(row):
        yield Text(f"      decisions  {changed}")
    for letter, tuned in (("A", row.before), ("B", row.after)):
        if tuned is not None:
            yield Text(f"      {letter}  {words.how_it_converged(tuned)}")
            yield Text(f"         {tuned.command}", style="dim")


def markdown(found: Comparison) -> str:
    """The same as Markdown."""
    return "\n".join(_markdown(found)) + "\n"


def _markdown(found: Comparison) -> Iterator[str]:
    yield f"**{words.summary(found)}**\n"
    yield "| | A | B |\n| --- | --- | --- |"
    for name, (one, other) in words.headers(found).items():
        loud = "**differs:** " if name in found.differences else ""
        yield f"| {loud}{name} | {_cell(one)} | {_cell(other)} |"
    if found.differences:
        names = ", ".join(found.differences)
        yield f"\n> **The surroundings differ**: {names}."
    for heading, rows in words.groups(found.rows):
        yield f"\n### {heading}\n"
        yield "| " + " | ".join(words.COLUMNS) + " |"
        yield "| --- | --- |" + " ---: |" * (len(words.COLUMNS) - 2)
        for row in rows:
            yield "| " + " | ".join(map(_cell, words.cells(row))) + " |"
        yield "\n<details><summary>decisions, searches, commands</summary>\n"
        for row in rows:
            yield from _markdown_details(row)
        yield "\n</details>"
    for note in words.notes(found):
        yield f"\n> {note}."


def _markdown_details(row: Row) -> Iterator[str]:
    yield f"- `{row.subject.kernel}`, `{row.subject.spec}`"
    if changed := words.changed(row):
        yield f"  - decisions: {changed}"
    for letter, tuned in (("A", row.before), ("B", row.after)):
        if tuned is not None:
            yield f"  - {letter}: {words.how_it_converged(tuned)}; `{tuned.command}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

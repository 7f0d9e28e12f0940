"""``deft-tvm compare``: what became faster or slower from one tuning log to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deft_tvm.commands.common import (
    CHECK_FAILED,
    JsonOption,
    console,
    is_installed,
    needs_compiler,
    print_json,
)
from deft_tvm.files import write_whole

if TYPE_CHECKING:
    from deft_tvm.compare.comparison import Comparison, Row
    from deft_tvm.compare.sources import Tuned


def compare(
    logs: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C…]",
            help="Tuning logs, or folders of one device's: the first beside each other one.",
        ),
    ],
    fail_on_regression: Annotated[
        str | None,
        typer.Option(metavar="5%", help="Exit with 1 where a row is surely slower by more."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="missing|geomean:2%",
            help="Exit with 1 where a row of A has no time in B, or the mean is surely slower.",
        ),
    ] = None,
    as_json: JsonOption = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a merge request.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one page that needs no network to this file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a drawing to this .svg or .png.")] = None,
) -> None:
    """Compare tuning logs, row by row: medians, the interval of their ratio, p, and a verdict.

    Times are in units of the matrix product that was timed in the same rounds, so that a slow hour
    of a shared machine is no slow kernel. A row is called faster or slower where chance does not
    explain it and it is by 5 % or more. Logs of two devices are compared by their shares of each
    device's limit, and nothing is called a regression.

    Example: deft-tvm compare logs/old logs/new --fail-on-regression 5% --fail-on missing
    """
    needs_compiler("compare")
    from deft_tvm.compare.comparison import compare as beside
    from deft_tvm.compare.gates import Gates
    from deft_tvm.compare.sources import Source

    gates = Gates.parse(fail_on_regression, fail_on or ())
    if len(logs) < 2:
        raise typer.BadParameter("one log is given; expected two or more")
    first, *others = map(Source.read, logs)
    found = [beside(first, other) for other in others]
    failures = [sentence for each in found for sentence in gates.failures(each)]
    if html is not None:
        from deft_tvm.compare.page import page

        write_whole(html, page(found).encode())
    if plot is not None:
        _plot(found, plot)
    if as_json:
        print_json({"comparisons": [_as_json(each) for each in found], "failures": failures})
    else:
        _print(found, failures, markdown)
    if failures:
        raise typer.Exit(CHECK_FAILED)


def _plot(found: list[Comparison], path: Path) -> None:
    from deft_tvm.errors import CompilerMissing, installing

    if not is_installed("matplotlib"):
        raise CompilerMissing(f"--plot needs matplotlib; run {installing('plot')}")
    from deft_tvm.compare.plot import plot

    plot(found, path)


def _print(found: list[Comparison], failures: list[str], as_markdown: bool) -> None:
    from deft_tvm.compare.text import markdown, text

    out = console()
    for each in found:
        if as_markdown:
            typer.echo(markdown(each))
        else:
            out.print(text(each))
    for sentence in failures:
        typer.echo(f"FAILED: {sentence}", err=not as_markdown)


def _as_json(found: Comparison) -> dict[str, Any]:
    from deft_tvm.compare import words

    return {
        "before": dict(words.header(found.before)),
        "after": dict(words.header(found.after)),
        "differences": found.differences,
        "across_devices": found.across_devices,
        "geomean": found.mean,
        "shared": found.shared,
        "notes": words.notes(found),
        "rows": [_row(row) for row in found.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **row.subject._asdict(),
        "verdict": row.verdict.value if row.verdict else None,
        "ratio": row.ratio,
        "apart": row.apart,
        "p": row.p,
        "anchored": row.anchored,
        "before": _tuned(row.before),
        "after": _tuned(row.after),
        "decisions_changed": row.decisions,
    }


def _tuned(tuned: Tuned | None) -> dict[str, Any] | None:
    from deft_tvm.compare.convergence import convergence

    if tuned is None:
        return None
    return {
        "log": tuned.log,
        "median_us": tuned.best.median_us if tuned.best else None,
        "latency_us": tuned.best.latency_us if tuned.best else (),
        "decision": tuned.best.decision if tuned.best else None,
        "limit_share": tuned.limit_share,
        "convergence": convergence(tuned),
        "command": tuned.command,
    }

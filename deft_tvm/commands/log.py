"""``deft-tvm log merge|measure|export|replay``: what can be done with a log that is there."""

from __future__ import annotations

import statistics
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deft_tvm.commands.common import (
    ApartOption,
    JsonOption,
    console,
    needs_compiler,
    print_json,
    table,
)
from deft_tvm.commands.progress import shown
from deft_tvm.errors import LogError

if TYPE_CHECKING:
    from deft_tvm.tuning.replay import Replay

LogArgument = Annotated[Path, typer.Argument(metavar="LOG", help="A log's folder.")]
KernelOption = Annotated[
    str | None, typer.Option(help="merge, or a tile class as in r64t64f32; by default all.")
]

log = typer.Typer(
    help="Merge tuning logs, measure their winners again, hand them to other tools, or search them "
    "by another strategy.",
    no_args_is_help=True,
)


class Format(str, Enum):
    """What `export` can write."""

    T4 = "t4"


@log.command()
def merge(
    logs: Annotated[list[Path], typer.Argument(metavar="LOGS…", help="Logs, or folders of them.")],
    into: Annotated[Path, typer.Option(help="Folder of logs that all lines are added to.")],
    as_json: JsonOption = False,
) -> None:
    """Bring the logs of several machines into one folder, by device and spec.

    Every line is there once, in the order of the runs; a reader sees a log as it was or as it is.

    Example: deft-tvm log merge machine-1/logs machine-2/logs --into logs
    """
    from deft_tvm.tuning.merge import merge as bring_together

    found = bring_together(logs, into)
    if as_json:
        print_json([{**vars(each), "log": each.log.path} for each in found])
        return
    for each in found:
        damaged = f", {each.skipped} damaged lines left out" if each.skipped else ""
        typer.echo(f"{each.log.path}: {each.added} lines added, {each.lines} in all{damaged}")


@log.command()
def measure(
    log: Annotated[
        Path, typer.Argument(metavar="LOG", help="A log's folder, or that of a device's logs.")
    ],
    into: Annotated[
        Path,
        typer.Option(help="Folder of logs to write to, another than those that are built from."),
    ],
    kernel: KernelOption = None,
    workload: Annotated[
        str | None, typer.Option(help="The workload it was tuned on; by default each.")
    ] = None,
    apart: ApartOption = None,
) -> None:
    """Measure the winners of a log again, or of several logs in turn, as tuning does at its end.

    What it finds can be compared with the log: deft-tvm compare OLD NEW.

    Example: deft-tvm log measure logs/amd-epyc-avx512bf16-2c/gqa-… --into again
    """
    needs_compiler("log measure")
    from deft_tvm.tuning.again import measure_again
    from deft_tvm.tuning.log import TuningLog, log_folders

    logs = [TuningLog(folder) for folder in log_folders(log)]
    if not logs:
        raise LogError(f"{log} holds no tuning log; expected a log's folder, or a device's logs")
    with shown(str(log)) as listener:
        written = measure_again(
            *logs,
            kernel=kernel,
            workload=workload,
            into=into,
            apart=apart,
            listener=listener,
        )
    for each in written:
        typer.echo(each.directory)


@log.command()
def export(
    log: LogArgument,
    out: Annotated[Path, typer.Option(help="Folder for the files, one for each kernel.")],
    format_: Annotated[
        Format, typer.Option("--format", help="t4: the results schema of Kernel Tuner.")
    ] = Format.T4,
) -> None:
    """Write a log for other tools.

    Example: deft-tvm log export logs/amd-epyc-avx512bf16-2c/gqa-… --format t4 --out t4
    """
    from deft_tvm.tuning.export import export_t4
    from deft_tvm.tuning.log import TuningLog

    writers = {Format.T4: export_t4}
    for path in writers[format_](TuningLog(log), out):
        typer.echo(path)


@log.command()
def replay(
    log: LogArgument,
    kernel: KernelOption = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="greedy (the one that tunes), climbing, random; by default all three."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each, one for every seed.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Search a log's recorded trials by other strategies, and see how soon each comes to the best.

    Nothing is run on the device: a strategy gets the recorded time of whatever it proposes.

    Example: deft-tvm log replay logs/amd-epyc-avx512bf16-2c/gqa-… --strategy random
    """
    needs_compiler("log replay")
    from deft_tvm.errors import InputError
    from deft_tvm.tuning.log import TuningLog
    from deft_tvm.tuning.logged import logged_device, logged_kernels
    from deft_tvm.tuning.replay import replay as again
    from deft_tvm.tuning.strategy import HABITS

    for name in strategy or ():
        if name not in HABITS:
            raise InputError(f"--strategy is {name!r}; expected one of {', '.join(HABITS)}")
    source = TuningLog(log)
    kernels = logged_kernels(source, logged_device(source), kernel)
    found = [
        again(each, name, HABITS[name], range(seeds))
        for each in kernels
        for name in strategy or HABITS
        if any(each.tried.values())
    ]
    if as_json:
        print_json(found)
        return
    columns = ("kernel", "strategy", "trials to 5 %", "after a quarter", "after half", "trials")
    console().print(table("", columns, [_row(each) for each in found]))


def _row(found: Replay) -> tuple[str, ...]:
    trials = len(found.best)
    return (
        found.kernel,
        found.strategy,
        f"{statistics.median(found.to_near):g}",
        f"{found.best[max(1, trials // 4) - 1]:.3f}",
        f"{found.best[max(1, trials // 2) - 1]:.3f}",
        str(trials),
    )

"""``deft-tvm gpu-check``: everything that a GPU machine is needed for, in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from deft_tvm.commands.common import CHECK_FAILED, console, finite, table
from deft_tvm.device import Kind


def gpu_check(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            help="Stages to run: build, rates, exact, sanitize, tune, warm, bench, decode; by "
            "default all, in this order."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of what they find, of one device.")] = Path(
        "gpu-check"
    ),
    device: Annotated[str, typer.Option(help="cuda, or cpu to see whether all is in place.")] = (
        "cuda"
    ),
    minutes: Annotated[
        float,
        typer.Option(min=0.01, callback=finite, help="After which a stage is stopped."),
    ] = 9.0,
    again: Annotated[
        bool, typer.Option(help="Run stages that were ok already, too, from their beginning.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Further one of the one stage that is named, as in --option=--flex; "
            "`python -m deft_tvm.gpu_check.bench --help` lists those of bench."
        ),
    ] = None,
) -> None:
    """Check and measure a GPU in stages, each in a process of its own and within a few minutes.

    Each stage leaves what it finds at once, and a record when it ends. The same command goes on
    with those that have not been ok, most of them after what they have. Exits with 1 if one was
    not.

    Example: deft-tvm gpu-check rates exact --out found
    """
    import torch

    from deft_tvm.errors import InputError
    from deft_tvm.gpu_check import chosen, run

    if device not in ("cuda", "cpu"):
        raise InputError(f"device is {device!r}; expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda' and torch finds none; expected a GPU, or --device cpu")
    if option and len(stages or ()) != 1:
        raise InputError(f"--option is {option} for {stages or 'all stages'}; expected one stage")
    records = []
    for stage in chosen(stages or []):
        typer.echo(f"{stage.name}: {stage.what}", err=True)
        seconds = 60 * minutes
        kind = cast(Kind, device)
        records.append(run(stage, out, kind, seconds, again=again, options=option or ()))
    rows = [(r.stage, r.status, f"{r.seconds:.1f}", str(out / f"{r.stage}.txt")) for r in records]
    console().print(table("", ("stage", "status", "seconds", "printed"), rows))
    raise typer.Exit(0 if all(record.status == "ok" for record in records) else CHECK_FAILED)

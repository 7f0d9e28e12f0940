"""``deft-tvm tune``: find the best decision for each kernel on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    JsonOption,
    SeedOption,
    SpecOption,
    console,
    needs_compiler,
    print_json,
    table,
)
from deft_tvm.commands.progress import shown
from deft_tvm.workloads import parse as parse_workload
from deft_tvm.workloads.notation import HELP as WORKLOADS_HELP

if TYPE_CHECKING:
    from deft_tvm.tuning.result import KernelResult, TuningResult

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


def tune(
    workload: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKLOADS",
            help=f"Trees whose work is timed, by default four: {WORKLOADS_HELP}.",
        ),
    ] = None,
    spec: SpecOption = DEFAULT_SPEC,
    trials: Annotated[
        int, typer.Option(min=1, help="Decisions to try, those already in the log included.")
    ] = 24,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Try ways to schedule the kernels on this machine, keep all results, build the best.

    It may be stopped at any moment: the same command goes on where it was, from its log.

    Example: deft-tvm tune few_shot speculative --trials 100
    """
    needs_compiler("tune")
    from deft_tvm.device import DeviceProfile
    from deft_tvm.manifest import cache_directory, check_place
    from deft_tvm.spec import AttentionSpec

    attention_spec = AttentionSpec.parse(spec)
    # What is wrong is refused here, before anything is measured.
    for text in workload or ():
        parse_workload(text)
    check_place(cache_directory(attention_spec, DeviceProfile.detect()))
    try:
        with shown(str(attention_spec)) as listener:
            from deft_tvm.build import build
            from deft_tvm.tuning.tune import WORKLOADS
            from deft_tvm.tuning.tune import tune as search

            chosen = workload or WORKLOADS
            found = search(attention_spec, chosen, trials=trials, seed=seed, listener=listener)
            module = build(attention_spec)
    except KeyboardInterrupt:
        typer.echo(
            "stopped; all finished trials are in the log, the same command goes on", err=True
        )
        raise typer.Exit(STOPPED) from None
    if as_json:
        print_json(
            {
                "spec": str(attention_spec),
                "log": found.log.path,
                "module": module,
                "new_trials": found.new_trials,
                "seconds": found.seconds,
                "kernels": found.kernels,
            }
        )
    else:
        _print(found, str(module))


def _print(found: TuningResult, module: str) -> None:
    columns = ("kernel", "best µs", "default µs", "faster", "trials")
    out = console()
    out.print(table("", columns, [_row(kernel) for kernel in found.kernels.values()]))
    if found.skipped_lines:
        out.print(f"{found.skipped_lines} lines of the log could not be read and were skipped")
    out.print(f"log     {found.log.path}\nmodule  {module}")


def _row(kernel: KernelResult) -> tuple[str, ...]:
    default = kernel.default_us
    return (
        kernel.kernel,
        f"{kernel.best_us:.1f}",
        "" if default is None else f"{default:.1f}",
        "" if default is None else f"{default / kernel.best_us:.2f}×",
        f"{kernel.trials} of {kernel.decisions}",
    )

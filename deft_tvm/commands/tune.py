"""``deft-tvm tune``: find the best decision for each kernel on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, cast

import typer

from deft_tvm import interruption
from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    ApartOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    SpecsOption,
    console,
    finite,
    needs_compiler,
    print_json,
    specs_of,
    table,
)
from deft_tvm.commands.progress import shown, told
from deft_tvm.device import Kind
from deft_tvm.errors import InputError
from deft_tvm.exit_codes import INTERRUPTED
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.budget import DEFAULT_TRIALS
from deft_tvm.workloads import parse as parse_workload
from deft_tvm.workloads.notation import HELP as WORKLOADS_HELP

if TYPE_CHECKING:
    from pathlib import Path

    from deft_tvm.tuning.fleet import Fleet
    from deft_tvm.tuning.result import KernelResult, TuningResult


def tune(
    workload: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKLOADS",
            help=f"Trees whose work is timed, by default four: {WORKLOADS_HELP}.",
        ),
    ] = None,
    spec: SpecsOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decisions to try for each spec, those already in its log included; by default "
            f"{DEFAULT_TRIALS}, or with --minutes as many as there is time for.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e6,
            callback=finite,
            help="Time for the search of all specs together; measuring the best again comes on "
            "top, some minutes for each.",
        ),
    ] = None,
    seed: SeedOption = 0,
    apart: ApartOption = None,
    rpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Measure on the machines that wait at this tracker, see `serve-device`.",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="With --rpc: what they registered as.")] = None,
    device: Annotated[str, typer.Option(help="Of this machine: cpu, or cuda for its GPU.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Try ways to schedule the kernels on this machine, keep all results, build the best.

    It may be stopped at any moment: the same command goes on where it was, from its log.

    With --rpc the kernels are tuned for the devices of other machines, as many candidates at once
    as there are, and the modules built for these.

    Example: deft-tvm tune few_shot speculative --model ./llama --minutes 20
    """
    needs_compiler("tune")
    from deft_tvm.device import DeviceProfile
    from deft_tvm.manifest import cache_directory, check_place

    asked = specs_of(spec, model, dtype) or [AttentionSpec.parse(DEFAULT_SPEC)]
    specs = list(dict.fromkeys(asked))
    # What is wrong is refused here, before anything is measured.
    for text in workload or ():
        parse_workload(text)
    if (rpc is None) != (key is None):
        raise InputError(f"--rpc is {rpc!r} and --key is {key!r}; expected both or neither")
    if device not in ("cpu", "cuda") or (rpc is not None and device != "cpu"):
        wanted = "cpu or cuda" if rpc is None else "none beside --rpc"
        raise InputError(f"--device is {device!r}; expected {wanted}")
    kind = cast(Kind, device)
    if rpc is None:
        for each in specs:
            check_place(cache_directory(each, DeviceProfile.detect(kind)))
    if trials is None and minutes is None:
        trials = DEFAULT_TRIALS
    share = None if minutes is None else minutes / len(specs)
    found: list[tuple[AttentionSpec, TuningResult, Path]] = []
    try:
        with interruption.kept(), _fleet(rpc, key) as fleet:
            for one in _tune(specs, workload, trials, share, seed, apart, kind, fleet):
                found.append(one)
    except KeyboardInterrupt:
        typer.echo(
            "stopped; all finished trials are in the log, the same command goes on", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if as_json:
            print_json([_as_json(*each) for each in found])
        else:
            _print(found)


@contextmanager
def _fleet(tracker: str | None, key: str | None) -> Iterator[Fleet | None]:
    """The machines of a key; None for this one."""
    if tracker is None or key is None:
        yield None
        return
    with told() as say:
        say(f"asking {tracker} for machines of key {key}")
        from deft_tvm.tuning.fleet import Fleet

        fleet = Fleet(tracker, key)
    with closing(fleet):
        yield fleet


def _tune(
    specs: Sequence[AttentionSpec],
    workloads: list[str] | None,
    trials: int | None,
    minutes: float | None,
    seed: int,
    apart: float | None,
    kind: Kind,
    fleet: Fleet | None,
) -> Iterator[tuple[AttentionSpec, TuningResult, Path]]:
    """Tune all specs, then build their modules one by one."""
    title = str(specs[0]) if len(specs) == 1 else f"{len(specs)} attentions"
    with shown(title) as listener:
        from deft_tvm.build import build
        from deft_tvm.tuning.probe import known_device
        from deft_tvm.tuning.tune import WORKLOADS, tune

        device = None if fleet is None else fleet.device
        if kind == "cuda":
            device = known_device(listener=listener, kind=kind)
        found = tune(
            specs,
            workloads or WORKLOADS,
            trials=trials,
            minutes=minutes,
            device=device,
            seed=seed,
            apart=apart,
            listener=listener,
            runner=fleet,
        )
        for spec, each in zip(specs, found, strict=True):
            yield spec, each, build(spec, device)


def _as_json(spec: AttentionSpec, found: TuningResult, module: Path) -> dict[str, object]:
    return {
        "spec": str(spec),
        "log": found.log.path,
        "module": module,
        "new_trials": found.new_trials,
        "seconds": found.seconds,
        "kernels": found.kernels,
    }


def _print(found: list[tuple[AttentionSpec, TuningResult, Path]]) -> None:
    columns = ("kernel", "best µs", "default µs", "faster", "of the limit", "trials")
    out = console()
    for spec, result, module in found:
        rows = [_row(kernel) for kernel in result.kernels.values()]
        out.print(table(str(spec), columns, rows))
        if result.skipped_lines:
            out.print(f"{result.skipped_lines} lines of the log could not be read and were skipped")
        out.print(f"log     {result.log.path}\nmodule  {module}\n")
    gains = [
        kernel.default_us / kernel.best_us
        for _, result, _ in found
        for kernel in result.kernels.values()
        if kernel.default_us
    ]
    if len(gains) > 1:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        out.print(f"{mean:.2f}× the defaults, the geometric mean of {len(gains)} kernels")


def _row(kernel: KernelResult) -> tuple[str, ...]:
    default = kernel.default_us
    return (
        kernel.kernel,
        f"{kernel.best_us:.1f}",
        "" if default is None else f"{default:.1f}",
        "" if default is None else f"{default / kernel.best_us:.2f}×",
        f"{kernel.limit_us / kernel.best_us:.0%}",
        f"{kernel.trials} of {kernel.decisions}",
    )

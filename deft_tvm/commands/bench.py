"""``deft-tvm bench``: how fast is it here, and beside what?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType

from deft_tvm.commands.common import (
    CHECK_FAILED,
    DEFAULT_SPEC,
    DEFAULT_WORKLOAD,
    GroupingOption,
    JsonOption,
    ModuleOption,
    SpecOption,
    attention_by,
    console,
    finite,
    parse,
    print_json,
    table,
)
from deft_tvm.commands.progress import told
from deft_tvm.errors import InputError
from deft_tvm.workloads.notation import HELP as WORKLOADS_HELP

if TYPE_CHECKING:
    from deft_tvm.bench import Cell, Measurement
    from deft_tvm.bench.compare import Change
    from deft_tvm.spec import AttentionSpec
    from deft_tvm.workloads import Workload

ALL, CORE = "all", "core"


def bench(
    workload: Annotated[
        str,
        typer.Argument(
            metavar="WORKLOAD",
            help=f"The tree: {WORKLOADS_HELP}; or core, the fixed set of workloads and specs "
            "that releases are judged by.",
        ),
    ] = DEFAULT_WORKLOAD,
    spec: SpecOption = DEFAULT_SPEC,
    module: ModuleOption = None,
    grouping: GroupingOption = "auto",
    peers: Annotated[
        str | None,
        typer.Option(help="What to compare with: names, all, or '' for nothing."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="To spend on measuring each.")
    ] = 4.0,
    cold: Annotated[
        bool, typer.Option(help="Empty the caches before each call, as the other layers do.")
    ] = False,
    between: Annotated[
        bool, typer.Option(help="Also measure between two matrix products, as in a model.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Of core, the cells whose workload or spec has this in it.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Keep every sample in this file, with its origin.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="An earlier such file of this device: exit with 1 if anything is slower beyond "
            "noise."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time one step, its plan and merge included, in turn with all that torch could call instead.

    Of the peers KV is gathered beforehand and not counted; ours stays in pages. By default they are
    the ways to call SDPA; with core all there are, and every cell is also measured by other
    groupings and between matrix products.

    Example: deft-tvm bench core --only speculative --out new.jsonl --compare old.jsonl
    """
    from deft_tvm.bench import Cell
    from deft_tvm.bench.compare import Verdict, check_comparable
    from deft_tvm.bench.compare import compare as compare_records
    from deft_tvm.bench.record import Record
    from deft_tvm.device import DeviceProfile

    if only and workload != CORE:
        raise InputError(f"--only is {only!r} and the workload {workload!r}; expected core")
    of_one = {
        "--spec": spec != DEFAULT_SPEC,
        "--module": module is not None,
        "--grouping": grouping != "auto",
        "--cold": cold,
        "--between": between,
    }
    given = ", ".join(name for name, is_given in of_one.items() if is_given)
    if given and workload == CORE:
        raise InputError(f"{given} with core, whose cells say all that; expected another workload")
    cells = _core(only) if workload == CORE else [Cell(workload, spec)]
    parsed = [parse(cell.spec, cell.workload) for cell in cells]
    before = None if compare is None else Record.read(compare)
    if before is not None:
        names = [(each.name, str(each_spec)) for each_spec, each in parsed]
        check_comparable(before, DeviceProfile.detect().slug, names)
    with told() as say:
        if workload == CORE:
            measuring = _all(cells, peers, seconds, say)
        else:
            measuring = _one(*parsed[0], module, grouping, peers, seconds, cold, between, say)
        record = Record.of(measuring, out)
    changes = [] if before is None else compare_records(before, record)
    if as_json:
        print_json({"record": record, "changes": changes})
    else:
        console().print(report(list(record.measurements), changes))
    if any(change.verdict is Verdict.SLOWER for change in changes):
        raise typer.Exit(CHECK_FAILED)


def _one(
    spec: AttentionSpec,
    workload: Workload,
    module: Path | None,
    grouping: str,
    peers: str | None,
    seconds: float,
    cold: bool,
    between: bool,
    say: Callable[[str], None],
) -> Iterator[Measurement]:
    """As `_all`, of one workload; nothing is built or measured before it is asked for."""
    from deft_tvm.bench import measure
    from deft_tvm.peers import QUICK
    from deft_tvm.workloads import tensors

    attention = attention_by(spec, module, grouping, say)
    say(f"random tensors for {workload.name}")
    yield measure(
        workload.name,
        tensors(workload.forest, spec),
        attention,
        _named(peers, QUICK),
        budget=seconds,
        cold=cold,
        between=between,
        say=say,
    )


def _core(only: str) -> list[Cell]:
    from deft_tvm.bench import CORE as CELLS

    cells = [cell for cell in CELLS if any(only in part for part in cell)]
    if not cells:
        raise InputError(f"--only is {only!r}; expected a part of a core cell's workload or spec")
    return cells


def _all(
    cells: Sequence[Cell], peers: str | None, seconds: float, say: Callable[[str], None]
) -> Iterator[Measurement]:
    from deft_tvm.bench.run import run
    from deft_tvm.peers import PEERS

    return run(cells, _named(peers, tuple(PEERS)), budget=seconds, say=say)


def _named(peers: str | None, default: Sequence[str]) -> Sequence[str]:
    """Peers as the user named them."""
    from deft_tvm.peers import PEERS

    if peers is None:
        return default
    return tuple(PEERS) if peers == ALL else [name for name in peers.split(",") if name]


def report(found: Sequence[Measurement], changes: Sequence[Change]) -> RenderableType:
    """What one measurement says, or tables of many; and what changed since an earlier record."""
    from deft_tvm.bench import report as rows

    parts: list[RenderableType] = []
    if len(found) == 1:
        parts += _details(found[0])
    else:
        parts += [
            table("", rows.SPEED, rows.speed(found)),
            table("\nof our time", rows.PARTS, rows.parts(found)),
            table("\nruns by plans of other groupings", rows.GROUPED, rows.grouped(found)),
            "\n".join(["", *rows.summary(found)]),
        ]
    if changes:
        parts.append(table("\nshare of the limit", rows.CHANGED, rows.changed(changes)))
    return Group(*parts)


def _details(found: Measurement) -> Iterator[RenderableType]:
    from deft_tvm.bench import report as rows
    from deft_tvm.peers import PEERS

    yield f"{found.workload}\n{found.spec} on {found.device}\n"
    yield table("", rows.CALLS, rows.calls(found))
    yield f"\nof the limit {rows.percent(found.share)}; {rows.of_ours(found)}"
    yield (
        f"KV read: {found.traffic.tree.kv / 2**20:.1f} MiB, "
        f"{found.traffic.kv_saved_percent:.1f} % less than by sequence"
    )
    if found.between:
        yield (
            f"between two matrix products {found.between_ratio.median:.2f}× its time alone; "
            f"a product after it {found.product_ratio.median:.2f}× its time after another"
        )
    yield from (f"{name}: {PEERS[name].setting}" for name in found.speedups())
    yield from (f"{name}: not run: {why}" for name, why in found.left_out.items())

"""``deft-tvm show tree|plan|tir|source``: what a tree, its plan and its kernels look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    DEFAULT_WORKLOAD,
    GroupingOption,
    JsonOption,
    SpecOption,
    WorkloadArgument,
    needs_compiler,
    parse,
    print_json,
)
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError
from deft_tvm.files import write_whole
from deft_tvm.spec import AttentionSpec, TileShape

if TYPE_CHECKING:
    from deft_tvm.build import KernelTask
    from deft_tvm.plan import Plan
    from deft_tvm.tree import Forest
    from deft_tvm.workloads import Workload

SvgOption = Annotated[
    Path | None, typer.Option(help="Write a drawing for a web page to this file instead.")
]
KernelOption = Annotated[
    str, typer.Option(help="merge, or a tile class as in r64t64f32; by default all.")
]

show = typer.Typer(
    help="Draw a tree or its plan, or print the program and machine code of the kernels.",
    no_args_is_help=True,
)


@show.command()
def tree(
    workload: WorkloadArgument = DEFAULT_WORKLOAD,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a workload's tree: a line for each node, its tokens and query rows.

    Example: deft-tvm show tree speculative:nodes=16
    """
    from deft_tvm import show as drawing

    forest = parse(DEFAULT_SPEC, workload)[1].forest
    _draw(forest, drawing.tree_svg, svg, _tree_record if as_json else drawing.tree)


@show.command()
def plan(
    workload: WorkloadArgument = DEFAULT_WORKLOAD,
    spec: SpecOption = DEFAULT_SPEC,
    grouping: GroupingOption = "auto",
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw how a tree is cut into work: which rows read which tokens together.

    Example: deft-tvm show plan few_shot:prompt=1000,branches=8 --grouping node
    """
    from deft_tvm import show as drawing

    made = planned(*parse(spec, workload), grouping)
    _draw(made, drawing.plan_svg, svg, _plan_record if as_json else drawing.plan)


@show.command()
def tir(
    spec: SpecOption = DEFAULT_SPEC,
    kernel: KernelOption = "",
    unscheduled: Annotated[
        bool, typer.Option(help="As the mathematics is written, before any schedule.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the kernels as TensorIR, scheduled for this machine.

    Example: deft-tvm show tir --kernel merge --unscheduled
    """
    needs_compiler("show tir")
    from deft_tvm.build import logged_decisions, lower

    tasks, device = _tasks(spec, kernel)
    if unscheduled:
        _print({task.name: task.computation.script() for task in tasks}, as_json)
    else:
        chosen = logged_decisions(AttentionSpec.parse(spec), device)
        _print({task.name: lower([task], chosen).script() for task in tasks}, as_json)


@show.command()
def source(
    spec: SpecOption = DEFAULT_SPEC, kernel: KernelOption = "", as_json: JsonOption = False
) -> None:
    """Print the machine code of the kernels, as assembly.

    Example: deft-tvm show source --kernel merge
    """
    needs_compiler("show source")
    from deft_tvm.build import compile_module, logged_decisions, lower

    tasks, device = _tasks(spec, kernel)
    chosen, target = logged_decisions(AttentionSpec.parse(spec), device), device.target()
    compiled = {task.name: compile_module(lower([task], chosen), target) for task in tasks}
    _print({name: built.mod.inspect_source("asm") for name, built in compiled.items()}, as_json)


def planned(spec: AttentionSpec, workload: Workload, grouping: str = "auto") -> Plan:
    """The plan of a workload on this device; no module is made for it."""
    from deft_tvm.plan import make_plan
    from deft_tvm.tuning.log import measured
    from deft_tvm.workloads.tensors import shuffled_pages

    device = measured(DeviceProfile.detect())
    pages = shuffled_pages(workload.forest, spec)
    tiles = _tiles(spec, device)
    return make_plan(workload.forest, pages, spec, tiles, device, grouping=grouping)


def _tiles(spec: AttentionSpec, device: DeviceProfile) -> tuple[TileShape, ...]:
    """Tile classes of the module that would be built; without a compiler, of the one there is."""
    try:
        from deft_tvm.schedules.tiles import default_tiles
    except ModuleNotFoundError:
        from deft_tvm.artifact import find

        return find(spec, device).tiles
    return default_tiles(spec, device.target()["kind"], frozenset(device.features))


def _tasks(spec: str, kernel: str) -> tuple[list[KernelTask], DeviceProfile]:
    from deft_tvm.build import tasks_for

    device = DeviceProfile.detect()
    tasks = tasks_for(AttentionSpec.parse(spec), device)
    chosen = [task for task in tasks if kernel in ("", task.name)]
    if not chosen:
        names = ", ".join(task.name for task in tasks)
        raise InputError(f"kernel is {kernel!r}; expected one of {names}")
    return chosen, device


def _draw(
    what: Any, to_svg: Callable[[Any], str], svg: Path | None, told: Callable[[Any], Any]
) -> None:
    """A drawing into the file that was asked for, or `told` of it: text, or an object for JSON."""
    if svg is not None:
        write_whole(svg, to_svg(what).encode())
    record = told(what)
    if not isinstance(record, str):
        print_json(record)
    elif svg is None:
        typer.echo(record)


def _tree_record(forest: Forest) -> dict[str, Any]:
    """Nodes in the workload's order; a root's parent is -1."""
    columns = (forest.parents.tolist(), forest.lengths.tolist(), forest.rows.tolist())
    names = ("parent", "length", "rows")
    return {"nodes": [dict(zip(names, node, strict=True)) for node in zip(*columns, strict=True)]}


def _plan_record(plan: Plan) -> dict[str, Any]:
    """Items in the order of launch; their rows are numbered depth first, ends are exclusive."""
    launched = (
        (plan.tiles[t].name, i) for t, begin, end in plan.launches for i in range(begin, end)
    )
    items = [_item_record(plan, tile, item) for tile, item in launched]
    return {"grouping": plan.grouping, "partials": plan.num_partials, "items": items}


def _item_record(plan: Plan, tile: str, item: int) -> dict[str, Any]:
    from deft_tvm.plan.columns import Item
    from deft_tvm.show.text import pieces

    row, rows, tokens = plan.items[item, [Item.ROW_BEGIN, Item.NUM_ROWS, Item.NUM_TOKENS]].tolist()
    runs = [{"node": node, "begin": begin, "end": end} for node, begin, end in pieces(plan, item)]
    return {"tile": tile, "rows": [row, row + rows], "tokens": tokens, "runs": runs}


def _print(texts: dict[str, str], as_json: bool) -> None:
    """The text of each kernel."""
    if as_json:
        print_json(texts)
    else:
        typer.echo("\n".join(texts.values()))

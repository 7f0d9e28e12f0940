"""``deft-tvm show tree|plan|tir|source``: what a tree, its plan and its kernels look like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    DEFAULT_WORKLOAD,
    GroupingOption,
    SpecOption,
    WorkloadArgument,
    needs_compiler,
    parse,
)
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError
from deft_tvm.spec import AttentionSpec, TileShape

if TYPE_CHECKING:
    from deft_tvm.build import KernelTask
    from deft_tvm.plan import Plan
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
def tree(workload: WorkloadArgument = DEFAULT_WORKLOAD, svg: SvgOption = None) -> None:
    """Draw a workload's tree: a line for each node, its tokens and query rows.

    Example: deft-tvm show tree speculative:nodes=16
    """
    from deft_tvm import show as drawing

    forest = parse(DEFAULT_SPEC, workload)[1].forest
    _put(drawing.tree(forest) if svg is None else drawing.tree_svg(forest), svg)


@show.command()
def plan(
    workload: WorkloadArgument = DEFAULT_WORKLOAD,
    spec: SpecOption = DEFAULT_SPEC,
    grouping: GroupingOption = "auto",
    svg: SvgOption = None,
) -> None:
    """Draw how a tree is cut into work: which rows read which tokens together.

    Example: deft-tvm show plan few_shot:prompt=1000,branches=8 --grouping node
    """
    from deft_tvm import show as drawing

    made = planned(*parse(spec, workload), grouping)
    _put(drawing.plan(made) if svg is None else drawing.plan_svg(made), svg)


@show.command()
def tir(
    spec: SpecOption = DEFAULT_SPEC,
    kernel: KernelOption = "",
    unscheduled: Annotated[
        bool, typer.Option(help="As the mathematics is written, before any schedule.")
    ] = False,
) -> None:
    """Print the kernels as TensorIR, scheduled for this machine.

    Example: deft-tvm show tir --kernel merge --unscheduled
    """
    needs_compiler("show tir")
    from deft_tvm.build import logged_decisions, lower

    tasks, device = _tasks(spec, kernel)
    if unscheduled:
        typer.echo("\n".join(task.computation.script() for task in tasks))
    else:
        typer.echo(lower(tasks, logged_decisions(AttentionSpec.parse(spec), device)).script())


@show.command()
def source(spec: SpecOption = DEFAULT_SPEC, kernel: KernelOption = "") -> None:
    """Print the machine code of the kernels, as assembly.

    Example: deft-tvm show source --kernel merge
    """
    needs_compiler("show source")
    from deft_tvm.build import compile_module, logged_decisions, lower

    tasks, device = _tasks(spec, kernel)
    module = lower(tasks, logged_decisions(AttentionSpec.parse(spec), device))
    typer.echo(compile_module(module, device.target()).mod.inspect_source("asm"))


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


def _put(text: str, file: Path | None) -> None:
    if file is None:
        typer.echo(text)
    else:
        file.write_text(text, encoding="utf-8")

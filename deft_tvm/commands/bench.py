"""``deft-tvm bench``: how fast is it here, and beside what?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType

from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    DEFAULT_WORKLOAD,
    GroupingOption,
    JsonOption,
    ModuleOption,
    SpecOption,
    WorkloadArgument,
    attention_by,
    console,
    parse,
    print_json,
    table,
)
from deft_tvm.commands.progress import told

if TYPE_CHECKING:
    from deft_tvm import bench as measuring

PEERS = "sequences,folded,batched,masked,cascade,cascade_masked"


def bench(
    workload: WorkloadArgument = DEFAULT_WORKLOAD,
    spec: SpecOption = DEFAULT_SPEC,
    module: ModuleOption = None,
    grouping: GroupingOption = "auto",
    peers: Annotated[
        str, typer.Option(help="What to compare with: names of peers, all, or nothing.")
    ] = PEERS,
    seconds: Annotated[float, typer.Option(help="To spend on measuring.")] = 4.0,
    cold: Annotated[
        bool, typer.Option(help="Empty the caches before each call, as the other layers do.")
    ] = False,
    between: Annotated[
        bool, typer.Option(help="Also measure between two matrix products, as in a model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time one step, its plan and merge included, in turn with other ways to compute it.

    SDPA is called sequence by sequence (sequences), the same with the group of a KV head folded
    into rows (folded) and with equally long sequences in one call (batched), and once over all
    tokens of a tree with a mask (masked). Its kernel is called for each node, and the results are
    merged (cascade), or for the shared prefix and once for the rest (cascade_masked). Compiled
    ones take longer: torch's FlexAttention (flex), and TVM's tree attention on one thread (tvm).
    Their KV is gathered beforehand, ours stays in pages.

    Example: deft-tvm bench sequences:count=16,tokens=1024 --peers batched
    """
    from deft_tvm import bench as measuring
    from deft_tvm.peers import PEERS as KNOWN
    from deft_tvm.workloads import tensors

    attention_spec, chosen = parse(spec, workload)
    names = [*KNOWN] if peers == "all" else [name for name in peers.split(",") if name]
    with told() as say:
        attention = attention_by(attention_spec, module, grouping, say)
        say(f"random tensors for {chosen.name}")
        case = tensors(chosen.forest, attention_spec)
        cold_bytes = 2 * attention.profile.l3_bytes if cold else 0
        found = measuring.measure(
            chosen.name, case, attention, names, budget=seconds, cold_bytes=cold_bytes, say=say
        )
        inside = None
        if between:
            say("timing a step between two matrix products")
            inside = measuring.between_matmuls(case, attention, budget=seconds / 2)
    if as_json:
        print_json({"measurement": found, "speedups": found.speedups(), "between": inside})
    else:
        console().print(report(found), *([] if inside is None else [report_between(inside)]))


def report(found: measuring.Measurement) -> RenderableType:
    """The table of a measurement, how its peers were set, and what its plan moves."""
    from deft_tvm.peers import PEERS as KNOWN

    rows = [_row(found, name) for name in found.timings]
    parts: list[RenderableType] = [
        f"{found.workload}\n{found.spec} on {found.device}\n",
        table("", ("ms", "median", "95 % of medians", "ours is faster"), rows),
        f"\nof ours the plan takes {1e3 * found.plan.median:.3f} ms; "
        f"KV read: {found.traffic.tree.kv / 2**20:.1f} MiB, "
        f"{found.traffic.kv_saved_percent:.1f} % less than by sequence",
    ]
    ran = (f"{name}: {KNOWN[name].setting}" for name in found.speedups())
    left_out = (f"{name}: not run: {why}" for name, why in found.left_out.items())
    return Group(*parts, "", *ran, *left_out)


def report_between(found: measuring.Between) -> RenderableType:
    """The table of a step between matrix products."""
    rows = [
        (
            name,
            f"{1e3 * found.alone[name].median:.3f}",
            f"{1e3 * found.between[name].median:.3f}",
            f"{found.slowdown(name):.2f}×",
        )
        for name in found.alone
    ]
    return table("\nbetween two matrix products", ("ms", "alone", "between", "ratio"), rows)


def _row(found: measuring.Measurement, name: str) -> tuple[str, str, str, str]:
    summary = found.timings[name].summary
    ratio = found.speedups().get(name)
    return (
        name,
        f"{1e3 * summary.median:.3f}",
        f"{1e3 * summary.low:.3f} to {1e3 * summary.high:.3f}",
        "" if ratio is None else f"{ratio.median:.2f}×",
    )

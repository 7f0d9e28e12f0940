"""``deft-tvm check``: is it exact here, and what does it move?"""

from __future__ import annotations

import typer

from deft_tvm.commands.common import (
    CHECK_FAILED,
    DEFAULT_SPEC,
    DEFAULT_WORKLOAD,
    GroupingOption,
    JsonOption,
    ModuleOption,
    SeedOption,
    SpecOption,
    WorkloadArgument,
    attention_by,
    console,
    parse,
    print_json,
)
from deft_tvm.commands.progress import told


def check(
    workload: WorkloadArgument = DEFAULT_WORKLOAD,
    spec: SpecOption = DEFAULT_SPEC,
    module: ModuleOption = None,
    grouping: GroupingOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run one step on random tensors, compare it with float64, and count what it moves.

    Exits with 1 if an error is larger than correct rounding explains.

    Example: deft-tvm check speculative:nodes=64 --spec gqa:hq=32,hkv=8,d=128,dtype=bf16
    """
    from deft_tvm.check import check as compare
    from deft_tvm.workloads import tensors

    attention_spec, chosen = parse(spec, workload)
    with told() as say:
        attention = attention_by(attention_spec, module, grouping, say)
        say(f"random tensors for {chosen.name}")
        case = tensors(chosen.forest, attention_spec, seed)
        say("one step, and the same in float64")
        found = compare(case, attention)
    traffic = attention.traffic
    if as_json:
        print_json(
            {
                "workload": chosen.name,
                "spec": str(attention_spec),
                "module": attention.artifact.directory,
                "exact": found.holds,
                "exactness": found,
                "traffic": traffic,
                "kv_saved_percent": traffic.kv_saved_percent,
            }
        )
    else:
        out = console()
        out.print(f"{chosen.name}\n{attention_spec}\n{attention.artifact.directory}\n")
        out.print(f"{attention.last_plan}\n")
        out.print(f"output  error {found.out_error:.2e}, bound {found.out_bound:.2e}")
        out.print(f"LSE     error {found.lse_error:.2e}, bound {found.lse_bound:.2e}\n")
        out.print(str(traffic))
        out.print("\nexact" if found.holds else "\nNOT exact: an error is beyond its bound")
    raise typer.Exit(0 if found.holds else CHECK_FAILED)

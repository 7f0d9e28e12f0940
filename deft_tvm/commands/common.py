"""What the commands share: their options, and printing as text or as JSON."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.table import Table

from deft_tvm import workloads
from deft_tvm.dtypes import LONG_DTYPE, Dtype
from deft_tvm.errors import CompilerMissing, InputError, installing
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import Workload
from deft_tvm.workloads.notation import HELP as WORKLOADS_HELP

if TYPE_CHECKING:
    from deft_tvm.pytorch import TreeAttention

DEFAULT_SPEC = "gqa:hq=32,hkv=8,d=128,dtype=f32,page=16,layout=nhd"
DEFAULT_WORKLOAD = "few_shot"
CHECK_FAILED = 1
WIDE = 200

SpecOption = Annotated[
    str,
    typer.Option(
        "--spec",
        metavar="SPEC",
        help="The attention: query heads, KV heads, head width, dtype (f32, f16, bf16), "
        "page size, layout (nhd, hnd); kv_dtype (e4m3 too), window, cap, sinks (yes) if it has "
        "them. mla:, gla: and gta: have fields of their own, which an error lists.",
    ),
]
SpecsOption = Annotated[
    list[str] | None,
    typer.Option("--spec", metavar="SPEC", help="An attention, as of `bench`; may be repeated."),
]
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="A model's config.json or folder: the attentions of its layers."),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Of --model, instead of its own: f32, f16 or bf16.")
]
WorkloadArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD",
        help=f"The tree: {WORKLOADS_HELP}.",
    ),
]
ModuleOption = Annotated[
    Path | None,
    typer.Option("--module", help="An exported module's folder, instead of the best one."),
]
GroupingOption = Annotated[
    str,
    typer.Option(help="How the tree is divided: auto, packed, node, node_chunk, flatten, sequence"),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Another one: other random numbers.")
]


def finite(number: float | None) -> float | None:
    """Callback of options: ranges without an end let ``inf`` pass, those of older typers ``nan``.

    Raises:
        BadParameter: it is ``nan`` or infinite.
    """
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"it is {number}; expected a number that is finite")
    return number


ApartOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=86400.0,
        callback=finite,
        help="Seconds between the passes of the last measurement, each then in a new process; by "
        "default 5, on a GPU 0. On a machine that is all yours 0 does: all passes in one process.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no text.")]


def parse(spec: str, workload: str) -> tuple[AttentionSpec, Workload]:
    """Both from what the user typed.

    Raises:
        SpecError: the spec cannot be read.
        WorkloadError: the workload cannot be read.
    """
    return AttentionSpec.parse(spec), workloads.parse(workload)


def specs_of(
    given: Sequence[str] | None, model: Path | None, dtype: str | None
) -> list[AttentionSpec]:
    """What ``--spec`` and ``--model`` name, each once.

    Raises:
        InputError: there is a dtype, and no model.
        SpecError: a spec or the model's configuration cannot be read.
    """
    if dtype is not None and model is None:
        raise InputError(f"--dtype is {dtype!r} and there is no --model; expected both")
    named = [AttentionSpec.parse(text) for text in given or ()]
    if model is not None:
        from deft_tvm.models import specs

        long = LONG_DTYPE.get(dtype or "", dtype)
        named += specs(model, dtype=cast("Dtype | None", long))
    return list(dict.fromkeys(named))


def console() -> Console:
    """Where text goes; where that is no terminal, without colours, and tables at full width."""
    made = Console(highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = WIDE
    return made


def attention_by(
    spec: AttentionSpec, module: Path | None, grouping: str, say: Callable[[str], None]
) -> TreeAttention:
    """Tree attention by `module`, or by the best one; says so, as it may have to be built."""
    if module is None:
        say("taking the best module, or building the default")
    from deft_tvm.pytorch import TreeAttention

    return TreeAttention(spec, module, grouping=grouping)


def print_json(value: Any) -> None:
    """In UTF-8, as JSON is, whatever the encoding of text is."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[RenderableType]]) -> Table:
    """A plain table, its first column to the left and numbers to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def needs_compiler(command: str) -> None:
    """Refuse early, with the command that helps, where the compiler is not installed.

    Raises:
        CompilerMissing: it is not.
    """
    if not is_installed("tvm"):
        raise CompilerMissing(f"`deft-tvm {command}` needs the compiler; run {installing('tune')}")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

"""The commands, one file each: parse, call, print."""

from __future__ import annotations

import typer

from deft_tvm.commands.bench import bench
from deft_tvm.commands.build import build
from deft_tvm.commands.check import check
from deft_tvm.commands.compare import compare
from deft_tvm.commands.gpu_check import gpu_check
from deft_tvm.commands.info import info
from deft_tvm.commands.log import log
from deft_tvm.commands.serve_device import serve_device
from deft_tvm.commands.show import show
from deft_tvm.commands.tune import tune

app = typer.Typer(
    help="Exact attention over trees of tokens, compiled and tuned for this machine.\n\n"
    "A SPEC is one attention (heads, width, dtype, page size), a WORKLOAD a tree to run it on; "
    "both have a default, so that every command can be tried as it stands.",
    epilog="First steps: deft-tvm info, deft-tvm show plan, deft-tvm tune, deft-tvm bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (tune, serve_device, compare, build, check, bench, gpu_check, info):
    app.command()(command)
app.add_typer(log, name="log")
app.add_typer(show, name="show")

"""``deft-tvm build``: from a spec and the tuning log to a module that needs no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deft_tvm.commands.common import (
    DEFAULT_SPEC,
    JsonOption,
    SpecOption,
    console,
    needs_compiler,
    print_json,
)


def build(
    spec: SpecOption = DEFAULT_SPEC,
    out: Annotated[
        Path | None, typer.Option(help="The module's folder; by default in the user's cache.")
    ] = None,
    device: Annotated[
        Path | None,
        typer.Option(help="Build for the machine whose `deft-tvm info --measure` wrote this file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile and export a module, with the best decisions of this device's tuning log.

    What it makes is a folder that can be copied: loading it needs torch and apache-tvm-ffi only.

    Example: deft-tvm build --spec gqa:hq=32,hkv=8,d=128,dtype=bf16 --out ./module
    """
    needs_compiler("build")
    from deft_tvm.build import build as make
    from deft_tvm.device import DeviceProfile
    from deft_tvm.manifest import read_manifest
    from deft_tvm.spec import AttentionSpec

    target = DeviceProfile.detect() if device is None else DeviceProfile.read(device)
    attention_spec, out_console = AttentionSpec.parse(spec), console()
    if as_json:
        directory = make(attention_spec, target, out=out)
        print_json({"module": directory, "manifest": read_manifest(directory)})
        return
    with out_console.status(f"compiling {attention_spec} for {target.slug}"):
        directory = make(attention_spec, target, out=out)
    manifest = read_manifest(directory)
    for kernel in (*manifest.tiles, manifest.merge):
        out_console.print(f"{kernel.function}: {kernel.tuned_from}")
    out_console.print(f"module written to {directory}")

"""``deft-tvm build``: from specs and tuning logs to modules that need no compiler, or a wheel."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deft_tvm import interruption
from deft_tvm.commands.common import (
    CHECK_FAILED,
    DEFAULT_SPEC,
    JsonOption,
    SpecsOption,
    console,
    is_installed,
    needs_compiler,
    print_json,
    specs_of,
)
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import CompilerMissing, DeftError, InputError, LogError, installing
from deft_tvm.manifest import Manifest, check_folder, read_manifest
from deft_tvm.spec import AttentionSpec

if TYPE_CHECKING:
    from deft_tvm.tuning.log import TuningLog


@dataclass(frozen=True)
class Job:
    """What to build, and the logs whose decisions it takes, where there are any."""

    spec: AttentionSpec
    logs: Sequence[TuningLog]


@dataclass(frozen=True)
class Built:
    """A module's folder, and what it says of itself."""

    module: Path
    manifest: Manifest


@dataclass(frozen=True)
class Failed:
    """A spec that there is no module of, or the log that does not tell its spec, and why."""

    name: str
    error: str


def build(
    spec: SpecsOption = None,
    every: Annotated[
        bool, typer.Option("--all", help="Build every spec that has a tuning log of the device.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The module's folder; of several, or with --all, the folder in which each gets "
            "its own, DEVICE/SPEC. By default in the user's cache."
        ),
    ] = None,
    device: Annotated[
        Path | None,
        typer.Option(
            help="Build for the machine whose `deft-tvm info --measure` wrote this file; or by "
            "this folder, which holds that file, device.json, and logs of the machine."
        ),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            help="Also pack what was built as a wheel into this folder: where pip installs it, "
            "the modules are found."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile and export modules, with the best decisions of this device's tuning logs.

    What it makes are folders that can be copied: loading one needs torch and apache-tvm-ffi only,
    and one for a GPU apache-tvm's CUDA runtime.

    If one of several fails, the others are built, no wheel is written, and it exits with 1.

    Example: deft-tvm build --spec gqa:hq=32,hkv=8,d=128,dtype=bf16 --out ./module

    Example: deft-tvm build --all --wheel ./dist
    """
    needs_compiler("build")
    if every and spec:
        raise InputError(f"--all is given beside --spec {spec[0]}; expected one of them")
    if wheel is not None:
        _check_wheel(wheel)
    target, logs = _target(device)
    jobs, failed = _logged(target, logs) if every else (_named(spec or [DEFAULT_SPEC], logs), [])
    several = every or len(jobs) > 1
    text = console()
    text.quiet = as_json
    built: list[Built] = []
    for job in jobs:
        folder = out / target.slug / job.spec.slug if several and out is not None else out
        try:
            with interruption.kept(), text.status(f"compiling {job.spec} for {target.slug}"):
                built.append(_build(job, target, folder))
        except Exception as error:  # of whatever kind, the others are built
            if not several:
                raise
            failed.append(Failed(str(job.spec), _sentence(error)))
        else:
            _print(built[-1], text)
    for each in failed:
        typer.echo(f"deft-tvm: {each.name}: {each.error}", err=True)
    packed = None if wheel is None or failed else _pack(built, wheel)
    if packed is not None:
        text.print(f"wheel written to {packed}")
    if as_json:
        found = {"modules": built, "failed": failed} if several else vars(built[0])
        print_json({**found, "wheel": packed})
    if failed:
        raise typer.Exit(CHECK_FAILED)


def _check_wheel(folder: Path) -> None:
    """Refuse before anything is compiled what could not be packed."""
    if not is_installed("hatchling"):
        raise CompilerMissing(f"--wheel needs hatchling; run {installing('tune')}")
    from deft_tvm.wheel import check_date

    check_date()
    check_folder(folder)


def _target(device: Path | None) -> tuple[DeviceProfile, dict[str, list[TuningLog]]]:
    """The device to build for, and its logs by the slug of their spec."""
    from deft_tvm.tuning.log import DEVICE, device_logs, log_roots

    if device is not None and device.is_dir():
        return DeviceProfile.read(device / DEVICE), device_logs([device])
    target = DeviceProfile.detect() if device is None else DeviceProfile.read(device)
    return target, device_logs(root / target.slug for root in log_roots())


def _logged(
    target: DeviceProfile, logs: Mapping[str, Sequence[TuningLog]]
) -> tuple[list[Job], list[Failed]]:
    """All that was tuned, and the logs that do not tell what that was."""
    from deft_tvm.tuning.log import logged_spec

    if not logs:
        raise LogError(f"--all finds no log of {target.slug}; expected one: run `deft-tvm tune`")
    jobs, failed = [], []
    for of_spec in logs.values():
        try:
            jobs.append(Job(logged_spec(of_spec), of_spec))
        except DeftError as error:
            failed.append(Failed(str(of_spec[0].directory), str(error)))
    return jobs, failed


def _named(texts: Sequence[str], logs: Mapping[str, Sequence[TuningLog]]) -> list[Job]:
    return [Job(spec, logs.get(spec.slug, ())) for spec in specs_of(texts, model=None, dtype=None)]


def _build(job: Job, target: DeviceProfile, out: Path | None) -> Built:
    from deft_tvm.build import build as make
    from deft_tvm.build import logged_decisions

    decisions = logged_decisions(job.spec, target, *job.logs)
    directory = make(job.spec, target, out=out, decisions=decisions)
    return Built(directory, read_manifest(directory))


def _sentence(error: Exception) -> str:
    """What went wrong with one of several; a fault of ours with its traceback."""
    if not isinstance(error, DeftError | OSError):
        traceback.print_exception(error)
    return str(error) or type(error).__name__


def _print(built: Built, text: Console) -> None:
    for kernel in (*built.manifest.tiles, built.manifest.merge):
        text.print(f"{kernel.function}: {kernel.tuned_from}")
    text.print(f"module written to {built.module}")


def _pack(built: Sequence[Built], folder: Path) -> Path:
    from deft_tvm.wheel import write_wheel

    return write_wheel([each.module for each in built], folder)

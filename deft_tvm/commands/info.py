"""``deft-tvm info``: this device, which logs and modules fit it, and what specs cache on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deft_tvm.commands.choice import Choice, choose, tell
from deft_tvm.commands.common import (
    DtypeOption,
    JsonOption,
    console,
    needs_compiler,
    print_json,
    specs_of,
    table,
)
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError, InputError, LogError
from deft_tvm.plan.intensity import Share, shares
from deft_tvm.spec import AttentionSpec

MATRIX = ("amx-bf16", "amx-int8", "avx512bf16", "avx512fp16", "bf16", "i8mm", "sm_")
"""Beginnings of the names of features that multiply matrices, or pairs of 16-bit numbers."""


@dataclass(frozen=True)
class FittingLog:
    """A tuning log of this device: how many trials were good, and lines were damaged.

    `refused` says why none of it can be read, and is empty where it can.
    """

    path: Path
    trials: int = 0
    good: int = 0
    skipped: int = 0
    refused: str = ""


@dataclass(frozen=True)
class FittingModule:
    """A module that runs on this device."""

    path: Path
    spec: str
    tuned: bool
    device: str


@dataclass(frozen=True)
class SpecShares:
    """What `spec` takes on each of several devices; `ridge` is of one, in FLOPs a byte.

    And which module it gets on this one.
    """

    spec: str
    device: str
    ridge: float
    shares: list[Share]
    search: Choice

    @classmethod
    def of(cls, spec: AttentionSpec, device: DeviceProfile) -> SpecShares:
        """Of devices that are all like `device`."""
        ridge = device.product_rate(spec.dtype) / device.read_bandwidth
        return cls(str(spec), device.slug, ridge, shares(spec), choose(spec, device))


def info(
    measure: Annotated[
        bool,
        typer.Option(help="Measure bandwidth and matrix rate again, and write them to a file."),
    ] = False,
    spec: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Show instead what this attention caches and computes a token, and which module "
            "it gets.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The same of each attention of a model: its folder, or config.json."),
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show this device, its instruction sets, its rates, and the logs and modules that fit it.

    Rates are nominal until they were measured, by `deft-tvm tune` or with --measure.

    With --spec or --model: bytes of KV on each of 1 to 8 tensor-parallel devices, and FLOPs for
    each of them beside this device's ridge, from which on sharing KV among rows gains nothing more.
    Then all folders where modules are looked for, and why each module is taken or passed over.

    Example: deft-tvm info --spec gqa:hq=32,hkv=8,d=128,dtype=bf16
    """
    from deft_tvm.tuning.log import measured

    named = _named(spec, model, dtype)
    device, profile = _measured_now() if measure else (measured(DeviceProfile.detect()), None)
    if named:
        found = [SpecShares.of(each, device) for each in named]
        if as_json:
            print_json(found[0] if model is None else {"model": model, "specs": found})
        else:
            _tell_shares(found, device)
        return
    logs, modules = fitting_logs(device), fitting_modules(device)
    if as_json:
        print_json({"device": device, "profile": profile, "logs": logs, "modules": modules})
        return
    _print(device, logs, modules)
    if profile is not None:
        console().print(f"\nprofile written to {profile}")


def fitting_logs(device: DeviceProfile) -> list[FittingLog]:
    """All logs of `device`, in the order in which they are looked for."""
    from deft_tvm.tuning.log import log_roots, logs_of

    found = []
    for log in logs_of(root / device.slug for root in log_roots()):
        try:
            trials = log.read()
        except LogError as error:
            found.append(FittingLog(log.directory, refused=str(error)))
            continue
        good = sum(trial.status == "ok" for trial in trials)
        found.append(FittingLog(log.directory, len(trials), good, trials.skipped))
    return found


def fitting_modules(device: DeviceProfile) -> list[FittingModule]:
    """All modules on the search path that run on `device`."""
    from deft_tvm.finding import artifacts, check_fits, search_path
    from deft_tvm.manifest import read_manifest

    found = []
    for directory in (candidate.directory for candidate in artifacts(search_path())):
        try:
            manifest = read_manifest(directory)
            check_fits(directory, manifest, device)
        except ArtifactError:
            continue
        found.append(FittingModule(directory, manifest.spec, manifest.tuned, manifest.device))
    return found


def _print(device: DeviceProfile, logs: list[FittingLog], modules: list[FittingModule]) -> None:
    matrix = [name for name in device.features if name.startswith(MATRIX)]
    vector = [name for name in device.features if name not in matrix]
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in device.matrix_rate.items())
    provenance = f"measured {device.date}" if device.measured else "nominal; --measure measures"
    rows = [
        ("device", device.slug),
        ("name", device.name),
        ("cores", str(device.cores)),
        ("caches", f"L2 {device.l2_bytes >> 10} KiB a core, L3 {device.l3_bytes >> 20} MiB"),
        ("vector", " ".join(vector)),
        ("matrix", " ".join(matrix) or "none"),
        ("read bandwidth", f"{device.read_bandwidth / 1e9:.1f} GB/s ({provenance})"),
        ("matrix rate", f"{rates} GFLOP/s ({provenance})"),
    ]
    width = max(len(name) for name, _ in rows)
    out = console()
    for name, value in rows:
        out.print(f"{name:<{width}}  {value}")
    out.print("\nlogs of this device" if logs else "\nno log: `deft-tvm tune` makes one")
    for log in logs:
        damaged = f"; {log.skipped} damaged lines skipped" if log.skipped else ""
        held = log.refused or f"{log.trials} trials, {log.good} of them good{damaged}"
        out.print(f"{log.path}\n    {held}")
    out.print("\nmodules for it" if modules else "\nno module: `deft-tvm build` makes one")
    for module in modules:
        decisions = "tuned" if module.tuned else "default"
        out.print(f"{module.path}\n    {module.spec}, {decisions}, built for {module.device}")


def _named(spec: str | None, model: Path | None, dtype: str | None) -> list[AttentionSpec]:
    """The attentions that the user asks about: none, one, or all of a model."""
    if spec is not None and model is not None:
        raise InputError(f"--spec is {spec!r} and --model {str(model)!r}; expected one of them")
    return specs_of([] if spec is None else [spec], model, dtype)


def _tell_shares(found: Sequence[SpecShares], device: DeviceProfile) -> None:
    out = console()
    for each in found:
        out.print(_table(each))
        out.print()
    # All have one dtype, and so one ridge.
    provenance = "measured" if device.measured else "nominal"
    out.print(
        f"KV bytes: of a token and layer on each device; copied: on all of them, beyond one copy."
        f"\nUnder rows that share a token, FLOPs a byte; * where at or above the ridge of "
        f"{device.slug}, {found[0].ridge:.1f} ({provenance})."
    )
    for each in found:
        tell(each.spec, each.search, out)


def _table(found: SpecShares) -> Table:
    lines = [
        [
            str(share.degree),
            f"{share.num_q_heads}/{share.num_kv_heads}",
            str(share.kv_bytes),
            str(share.copied_bytes),
            *(
                f"{intensity:.1f}{' *' if intensity >= found.ridge else '  '}"
                for intensity in share.flops_per_byte.values()
            ),
        ]
        for share in found.shares
    ]
    counts = found.shares[0].flops_per_byte
    rows = [f"{count} row{'s' if count > 1 else ''}  " for count in counts]
    return table(found.spec, ("devices", "heads of one", "KV bytes", "copied", *rows), lines)


def _measured_now() -> tuple[DeviceProfile, Path]:
    """The profile, and the file it was written to."""
    needs_compiler("info --measure")
    from deft_tvm.tuning.probe import probe, write_profile

    with Console(stderr=True).status("measuring bandwidth and matrix rate"):
        device = probe()
    return device, write_profile(device)

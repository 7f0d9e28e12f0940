"""Built modules as a Python package, which `deft_tvm.finding` sees where it is installed.

    deft_tvm_modules_<device>/__init__.py                      FOLDER, named by the entry point
    deft_tvm_modules_<device>/<device>/<spec>/module.so        as they were built
    deft_tvm_modules_<device>/<device>/<spec>/manifest.json

The same modules make the same bytes.
"""

from __future__ import annotations

import os
import re
import sysconfig
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hatchling.builders.wheel import WheelBuilder
from packaging.version import Version

import deft_tvm
from deft_tvm.errors import ArtifactError, InputError
from deft_tvm.files import AnyPath, write_whole
from deft_tvm.finding import ENTRY_POINTS
from deft_tvm.manifest import (
    KERNEL_ABI,
    MANIFEST,
    MODULE,
    Manifest,
    check_folder,
    check_whole,
    read_manifest,
    refuse,
)
from deft_tvm.spec import AttentionSpec

_PACKAGE = '''\
"""Modules of deft_tvm for {device}, which finds them by the entry point."""

from pathlib import Path

FOLDER = Path(__file__).parent
'''


DATE = "SOURCE_DATE_EPOCH"
DATES = range(315532800, 4354819200)
"""The years 1980 to 2107."""


class _Builder(WheelBuilder):
    """Of wheels with machine code, for any Python 3 on this platform."""

    def get_default_build_data(self) -> dict[str, Any]:
        platform = re.sub("[-.]", "_", sysconfig.get_platform())
        machine_code = {"tag": f"py3-none-{platform}", "pure_python": False}
        return {**super().get_default_build_data(), **machine_code}


def check_date() -> None:
    """Refuse what hatchling cannot take for the date of the files in a wheel.

    Raises:
        InputError: SOURCE_DATE_EPOCH is set to something else.
    """
    text = os.environ.get(DATE)
    if text is not None and not (text.isdecimal() and int(text) in DATES):
        raise InputError(
            f"{DATE} is {text!r}; expected seconds since 1970 from {DATES[0]} to {DATES[-1]}, as a "
            "zip file can hold, or none"
        )


def write_wheel(artifacts: Sequence[AnyPath], directory: AnyPath) -> Path:
    """Pack artifacts of one device as a wheel; it replaces one of the same name.

    Args:
        artifacts: their folders.
        directory: where the wheel is written.

    Returns:
        The wheel.

    Raises:
        ArtifactError: a module is damaged or for another device than the first, or the folder
            cannot be written.
        InputError: as `check_date`.
    """
    check_date()
    final = check_folder(directory)
    manifests = {Path(artifact).absolute(): read_manifest(artifact) for artifact in artifacts}
    device = next(iter(manifests.values())).device
    for artifact, manifest in manifests.items():
        check_whole(artifact, manifest.sha256, manifest.spec)
        if manifest.device != device:
            refuse(artifact / MANIFEST, "device", manifest.device, f"{device!r}, as of the first")
    with tempfile.TemporaryDirectory() as scratch:
        builder = _Builder(scratch, config=_project(device, manifests, Path(scratch)))
        (built,) = map(Path, builder.build(directory=scratch, versions=["standard"]))
        wheel = final / built.name
        try:
            write_whole(wheel, built.read_bytes())
        except OSError as error:
            raise ArtifactError(f"{wheel} cannot be written: {error.strerror}") from error
    return wheel


def _project(device: str, manifests: dict[Path, Manifest], scratch: Path) -> dict[str, Any]:
    """What would be its ``pyproject.toml``."""
    name = "deft_tvm_modules_" + re.sub(r"\W+", "_", device, flags=re.ASCII)
    package = scratch / "__init__.py"
    package.write_text(_PACKAGE.format(device=device), encoding="utf-8")
    files = {str(package): f"{name}/{package.name}"}
    for artifact, manifest in manifests.items():
        folder = f"{name}/{device}/{AttentionSpec.parse(manifest.spec).slug}"
        files |= {str(artifact / file): f"{folder}/{file}" for file in (MODULE, MANIFEST)}
    ours = Version(deft_tvm.__version__)
    newest = datetime.fromisoformat(max(manifest.created for manifest in manifests.values()))
    project = {
        "name": name,
        "version": f"{ours.base_version}.post{newest:%Y%m%d%H%M%S}",
        "description": f"Modules of deft_tvm for {device}: kernel ABI {KERNEL_ABI}",
        "requires-python": ">=3.10",
        "dependencies": [f"deft-tvm>={ours.public}"],
        "entry-points": {ENTRY_POINTS: {device: f"{name}:FOLDER"}},
    }
    wheel = {"force-include": files, "bypass-selection": True}
    return {"project": project, "tool": {"hatch": {"build": {"targets": {"wheel": wheel}}}}}

"""Runs a stage in a process of its own, and keeps what it printed as it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Literal

import msgspec

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.files import from_json, write_whole
from deft_tvm.gpu_check.folder import folder_of
from deft_tvm.gpu_check.stages import Stage
from deft_tvm.manifest import source_commit

Status = Literal["ok", "failed", "timeout"]

OWN_SHARE = 0.95
"""Of its time, after which a stage that can go on later ends by itself."""


class Record(msgspec.Struct, frozen=True):
    """What became of a stage: ``<name>.json``, beside ``<name>.txt`` with what it printed.

    Attributes:
        stage: its name.
        status: ``timeout`` where it was stopped.
        code: its exit code, negative for a signal.
        seconds: that it took.
        command: after ``python``.
        options: those of it that were asked for: it may have done a part of the stage alone.
        device: the slug of it.
        commit: of this package.
        began: UTC.
    """

    stage: str
    status: Status
    code: int
    seconds: float
    command: list[str]
    options: list[str]
    device: str
    commit: str
    began: str


def run(
    stage: Stage,
    out: Path,
    device: Kind,
    seconds: float,
    *,
    again: bool = False,
    options: Sequence[str] = (),
) -> Record:
    """Run a stage, unless it has been ok already and has no options of its own.

    Args:
        stage: which.
        out: folder of records.
        device: ``cuda`` or ``cpu``.
        seconds: after which it is stopped, with all its processes; what it printed is kept.
        again: run it whatever it has been, and from its beginning.
        options: of the stage's module.

    Raises:
        InputError: the folder is another device's.
    """
    here = DeviceProfile.detect(device)
    file = folder_of(here, out) / f"{stage.name}.json"
    known = None if again or options else _read(file)
    if known is not None and (known.status, known.options, known.device) == ("ok", [], here.slug):
        return known
    command = ["-m", stage.module, "--device", device]
    if stage.resumes:
        command += ["--out", str(out), "--minutes", f"{OWN_SHARE * seconds / 60:.3f}"]
        command += ["--again"] if again else []
    command += options
    began, clock = datetime.now(timezone.utc), time.monotonic()
    goes_on = stage.resumes and not again
    with open(out / f"{stage.name}.txt", "ab" if goes_on else "wb") as printed:
        # Unbuffered, so that a stage that is cut short leaves all that it had found.
        status, code = _run([sys.executable, "-u", *command], printed, seconds)
        os.fsync(printed.fileno())
    record = Record(
        stage.name,
        status,
        code,
        round(time.monotonic() - clock, 1),
        command,
        list(options),
        here.slug,
        source_commit(),
        began.isoformat(timespec="seconds"),
    )
    write_whole(file, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    return record


def run_aside(command: Sequence[str], seconds: float) -> tuple[Status, int, list[str]]:
    """Run a command: what became of it, its exit code, and the lines that it printed.

    Args:
        command: program and arguments.
        seconds: after which it is stopped, with all its processes.
    """
    with tempfile.TemporaryFile() as printed:
        status, code = _run(command, printed, seconds)
        printed.seek(0)
        return status, code, printed.read().decode(errors="replace").splitlines()


def _run(command: Sequence[str], printed: IO[bytes], seconds: float) -> tuple[Status, int]:
    """Until it ends or its time is over; then all processes of its session are ended."""
    process = subprocess.Popen(
        command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
    )
    return _wait(process, seconds), process.returncode


def _wait(process: subprocess.Popen[bytes], seconds: float) -> Status:
    try:
        return "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(file: Path) -> Record | None:
    """A record; None where there is none that can be read, so that the stage is run."""
    try:
        return from_json(file.read_bytes(), Record)
    except (OSError, msgspec.MsgspecError):
        return None

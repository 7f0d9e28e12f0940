"""Ctrl-C at a command, as real signals to real processes, also where TVM is calling Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tvm_ffi
from interrupting import ERROR, ITSELF, NOTHING
from small import FEW_SHOT, SPEC, module
from tuning_run import SPEC as TINY
from tuning_run import WORKLOAD

import deft_tvm.schedules  # noqa: F401  (tells TVM of errors)
from deft_tvm import interruption
from deft_tvm.errors import LogError, PlanError
from deft_tvm.exit_codes import INTERRUPTED
from deft_tvm.tuning.log import TuningLog

ROOT = Path(__file__).parents[1]
SCRIPT = str(Path(__file__).with_name("interrupting.py"))
IN_A_PASS = "deft_tvm.schedules.cpu.lowering.is_buffer_var"
IN_THE_SEARCH = "deft_tvm.tuning.space.apply_rules"
LIMIT = 240


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    own = {name: str(tmp_path / name.lower()) for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME")}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT), "DEFT_TVM_LOGS": str(tmp_path / "logs")}


def interrupted(
    environment: dict[str, str], function: str, becomes: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """A command that is interrupted in a function."""
    command = (sys.executable, SCRIPT, function, becomes, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LogError, PlanError])
def test_what_python_raises_inside_tvm_comes_out_as_it_is(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("said")

    with pytest.raises(error, match="said"):
        tvm_ffi.convert(fail)()


@pytest.mark.parametrize("becomes", [ITSELF, ERROR, NOTHING])
def test_a_build_of_several_ends_with_130_and_begins_no_other(
    environment: dict[str, str], tmp_path: Path, becomes: str
) -> None:
    out = tmp_path / "out"
    specs = ("--spec", str(TINY), "--spec", str(SPEC))
    found = interrupted(environment, IN_A_PASS, becomes, "build", *specs, "--out", str(out))
    assert (found.returncode, found.stderr) == (INTERRUPTED, "")
    assert len(list(out.rglob("manifest.json"))) <= 1
    assert str(SPEC) not in found.stdout


@pytest.mark.parametrize("becomes", [ITSELF, ERROR])
def test_a_check_ends_with_130(environment: dict[str, str], becomes: str) -> None:
    options = ("--spec", str(SPEC), "--module", str(module()))
    found = interrupted(
        environment, "deft_tvm.workloads.tensors", becomes, "check", FEW_SHOT, *options
    )
    assert found.returncode == INTERRUPTED
    assert "Traceback" not in found.stderr and "exact" not in found.stdout


@pytest.mark.parametrize("becomes", [ITSELF, ERROR])
def test_a_search_that_is_interrupted_blames_no_decision(
    environment: dict[str, str], tmp_path: Path, becomes: str
) -> None:
    options = ("--spec", str(TINY), "--trials", "2", "--apart", "0")
    found = interrupted(environment, IN_THE_SEARCH, becomes, "tune", WORKLOAD, *options)
    assert found.returncode == INTERRUPTED
    assert found.stderr.endswith("in the log, the same command goes on\n")
    assert "Traceback" not in found.stderr
    (log,) = (tmp_path / "logs").rglob(TINY.slug)
    assert [trial.status for trial in TuningLog(log).read()] == []


@pytest.mark.parametrize("lines", [1, 3, 5])
def test_a_tuning_stops_at_any_moment(
    environment: dict[str, str], tmp_path: Path, lines: int
) -> None:
    """After so many lines of what it tells; those that say of a trial come when it is kept."""
    options = ("--spec", str(TINY), "--trials", "4", "--apart", "0")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "", NOTHING, "tune", WORKLOAD, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(lines)]
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=LIMIT)
    assert process.returncode == INTERRUPTED
    assert rest.endswith("in the log, the same command goes on\n") and "Traceback" not in rest
    kept = [len(TuningLog(log.parent).read()) for log in (tmp_path / "logs").rglob("trials.jsonl")]
    assert sum(kept) >= sum(": ok, best" in line for line in said)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_only_what_is_watched_notes_an_interruption() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruption.watched():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("cleaning up failed") from None
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError), interruption.watched():
        raise ValueError("a fault")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.watched():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

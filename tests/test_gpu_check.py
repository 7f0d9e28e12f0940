"""``deft-tvm gpu-check``: stages by themselves, records at once, and going on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

from deft_tvm import gpu_check
from deft_tvm.cli import main
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError
from deft_tvm.gpu_check import STAGES, Record, Stage, chosen, run

WORKS = "print('found it'); print(sys.argv[1:])"
FAILS = "print('so far'); sys.exit(3)"
HANGS = "print('so far'); time.sleep(600)"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a stage of a line of Python."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def make(line: str, name: str = "toy") -> Stage:
        (tmp_path / f"{name}.py").write_text(f"import sys, time\n{line}\n", encoding="utf-8")
        return Stage(name, "does it", name)

    return make


def test_a_stage_leaves_what_it_printed_and_a_record(stage, tmp_path: Path) -> None:
    found = run(stage(WORKS), tmp_path / "out", "cpu", 60)
    assert (found.status, found.code, found.command) == ("ok", 0, ["-m", "toy", "--device", "cpu"])
    assert (tmp_path / "out/toy.txt").read_text() == "found it\n['--device', 'cpu']\n"
    kept = msgspec.json.decode((tmp_path / "out/toy.json").read_bytes(), type=Record)
    assert kept == found


def test_a_stage_that_fails_is_run_again_and_one_that_was_ok_is_not(stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    failed = run(stage(FAILS), out, "cpu", 60)
    assert (failed.status, failed.code) == ("failed", 3)
    assert (out / "toy.txt").read_text() == "so far\n"
    ok = run(stage(WORKS), out, "cpu", 60)
    assert ok.status == "ok"
    assert run(stage(FAILS), out, "cpu", 60) == ok
    assert run(stage(FAILS), out, "cpu", 60, again=True).status == "failed"


def test_a_part_of_a_stage_is_not_the_stage(stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part = run(stage(WORKS), out, "cpu", 60, options=["--only=some"])
    assert (part.status, part.options) == ("ok", ["--only=some"])
    assert run(stage(WORKS), out, "cpu", 60).options == []


def test_what_was_found_of_a_device_is_not_taken_for_another_s(
    stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    found = run(stage(WORKS), out, "cpu", 60)
    assert found.device == DeviceProfile.detect().slug
    other = DeviceProfile.nominal(cores=999)
    monkeypatch.setattr(DeviceProfile, "detect", lambda kind="cpu": other)
    said = rf"--out is '{out}', with what was found of {found.device}; expected a new folder for "
    with pytest.raises(InputError, match=said + other.slug):
        run(stage(WORKS), out, "cpu", 60)
    (out / "device.txt").unlink()
    assert run(stage(WORKS), out, "cpu", 60).device == other.slug, "nor where the folder is silent"


def test_a_stage_that_takes_too_long_is_stopped_and_leaves_what_it_had(
    stage, tmp_path: Path
) -> None:
    began = time.monotonic()
    found = run(stage(HANGS), tmp_path / "out", "cpu", 3)
    assert found.status == "timeout" and found.code == -9
    assert time.monotonic() - began < 60
    assert (tmp_path / "out/toy.txt").read_text() == "so far\n"


def test_a_stage_that_resumes_is_told_where_and_keeps_what_it_printed(
    stage, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(stage(FAILS), out, "cpu", 60)
    going_on = stage(WORKS)._replace(resumes=True)
    found = run(going_on, out, "cpu", 60)
    more = ["--out", str(out), "--minutes", "0.950"]
    assert found.command == ["-m", "toy", "--device", "cpu", *more]
    assert (out / "toy.txt").read_text().startswith("so far\nfound it\n")
    assert run(going_on, out, "cpu", 60, again=True).command[-1] == "--again"
    assert not (out / "toy.txt").read_text().startswith("so far")


def test_a_damaged_record_counts_as_none(stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(stage(WORKS), out, "cpu", 60)
    (out / "toy.json").write_text("{")
    assert run(stage(WORKS), out, "cpu", 60).status == "ok"


def test_stages_are_chosen_by_name_in_their_own_order() -> None:
    assert [s.name for s in chosen([])] == [s.name for s in STAGES]
    assert [s.name for s in chosen(["decode", "rates"])] == ["rates", "decode"]
    names = "build, rates, exact, sanitize, tune, warm, bench, decode"
    with pytest.raises(InputError, match=rf"stage is 'all'; expected one of {names}$"):
        chosen(["all"])


def test_the_command_runs_stages_and_ends_with_1_where_one_failed(
    stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    toys = (stage(WORKS, "good"), stage(FAILS, "bad"))
    monkeypatch.setattr(gpu_check, "chosen", lambda names: chosen(names, toys))
    for names, code in ((["good"], 0), ([], 1)):
        with pytest.raises(SystemExit) as ended:
            main(["gpu-check", *names, "--device", "cpu", "--out", str(tmp_path / "out")])
        assert ended.value.code == code
    printed = capsys.readouterr().out
    more = ["good", "--option=--more=1", "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["gpu-check", *more])
    assert json.loads((tmp_path / "out/good.json").read_text())["command"][-1] == "--more=1"
    with pytest.raises(SystemExit) as ended:
        main(["gpu-check", "bad", *more])
    assert ended.value.code == 2
    assert "expected one stage" in capsys.readouterr().err
    assert "good" in printed and "failed" in printed
    assert json.loads((tmp_path / "out/bad.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["gpu-check", "--device", device])
    assert ended.value.code == 2
    assert f"device is '{device}'" in capsys.readouterr().err

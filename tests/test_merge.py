"""Logs of several machines brought together, and handed to other tools."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from comparable import DEVICE, SPEC, equal, run_line, trial_line, write_log

from deft_tvm.cli import main
from deft_tvm.errors import LogError, TuningError
from deft_tvm.tuning.export import INVALIDITY, export_t4
from deft_tvm.tuning.lines import Status
from deft_tvm.tuning.log import DEVICE as PROFILE
from deft_tvm.tuning.log import TuningLog
from deft_tvm.tuning.merge import merge


def place(root: Path) -> TuningLog:
    return TuningLog(root / DEVICE.slug / SPEC.slug)


def write(root: Path, run: str, count: int, time: str) -> Path:
    log = place(root)
    log.append(run_line(run, time=time))
    for number in range(count):
        log.append(trial_line(number, "merge", run=run, time=time))
    return root


def test_every_line_is_there_once_in_the_order_of_the_runs(tmp_path: Path) -> None:
    late = write(tmp_path / "late", "b", 3, "2026-11-20T12:00:00+00:00")
    early = write(tmp_path / "early", "a", 2, "2026-11-20T10:00:00+00:00")
    both = tmp_path / "both"
    (first,) = merge([late, early], both)
    assert (first.lines, first.added, first.skipped) == (7, 7, 0)
    reading = place(both).read()
    assert [trial.identity for trial in reading] == [
        *(("a", 0), ("a", 1)),
        *(("b", 0), ("b", 1), ("b", 2)),
    ]
    assert set(reading.runs) == {"a", "b"}
    content = place(both).path.read_bytes()
    (again,) = merge([early, place(late).directory], both)
    assert again.added == 0 and place(both).path.read_bytes() == content


def test_lines_are_copied_as_they_stand(tmp_path: Path) -> None:
    """What a newer writer of the same schema has added stays."""
    source = place(write(tmp_path / "one", "a", 1, "2026-11-20T10:00:00+00:00"))
    run, trial = source.path.read_bytes().splitlines()
    newer = msgspec.json.encode(msgspec.json.decode(trial) | {"clock_mhz": 3000})
    source.path.write_bytes(run + b"\n" + newer + b"\nhalf a li")
    (found,) = merge([tmp_path / "one"], tmp_path / "all")
    assert place(tmp_path / "all").path.read_bytes() == run + b"\n" + newer + b"\n"
    assert found.skipped == 1


def test_two_accounts_of_one_trial_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "a", 1, "2026-11-20T10:00:00+00:00")
    other = tmp_path / "other"
    place(other).append(trial_line(0, "merge", run="a", status="timeout"))
    with pytest.raises(LogError, match=r"trial 0 of run a is there twice, and differs"):
        merge([one, other], tmp_path / "all")
    merge([one], tmp_path / "all")
    content = place(tmp_path / "all").path.read_bytes()
    with pytest.raises(LogError, match="differs"):
        merge([other], tmp_path / "all")
    assert place(tmp_path / "all").path.read_bytes() == content


def test_specs_and_devices_go_to_places_of_their_own(tmp_path: Path) -> None:
    write_log(tmp_path / "one", equal(1))
    write_log(tmp_path / "one", equal(1), device="another")
    assert len(merge([tmp_path / "one"], tmp_path / "all")) == 2
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["another", DEVICE.slug]


def test_a_log_without_a_line_that_can_be_read_is_left_out(tmp_path: Path) -> None:
    """A tuning that was stopped before its first trial, and one that never wrote a line."""
    source = write(tmp_path / "one", "a", 1, "2026-11-20T10:00:00+00:00")
    place(tmp_path / "stopped").append(run_line("b"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "trials.jsonl").touch()
    (found,) = merge([source, tmp_path / "stopped", tmp_path / "empty"], tmp_path / "all")
    assert found.lines == 3 and set(found.log.read().runs) == {"a", "b"}


def test_the_newest_measured_profile_is_kept(tmp_path: Path) -> None:
    for name, date in (("one", "2026-11-20"), ("two", "2026-11-21"), ("three", "")):
        root = write(tmp_path / name, name, 1, "2026-11-20T10:00:00+00:00")
        profile = msgspec.structs.replace(DEVICE, date=date, measured=bool(date), name=name)
        profile.write(root / DEVICE.slug / PROFILE)
    merge([tmp_path / name for name in ("one", "two", "three")], tmp_path / "all")
    kept = tmp_path / "all" / DEVICE.slug / PROFILE
    assert type(DEVICE).read(kept).name == "two"
    later = msgspec.structs.replace(DEVICE, date="2026-11-30", measured=True, name="four")
    later.write(tmp_path / "one" / DEVICE.slug / PROFILE)
    merge([tmp_path / "one"], tmp_path / "all")
    assert type(DEVICE).read(kept).name == "two", "by which the logs there were planned"


def test_a_log_that_is_being_tuned_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "one", "a", 1, "2026-11-20T10:00:00+00:00")
    target = place(tmp_path / "all")
    with target.only_writer(), pytest.raises(TuningError, match="another tuning writes"):
        merge([source], tmp_path / "all")
    with pytest.raises(LogError, match=r"has no log in it; expected a tuning log"):
        merge([tmp_path / "all"], tmp_path / "more")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "one", "a", 2, "2026-11-20T10:00:00+00:00")
    with pytest.raises(SystemExit) as ended:
        main(["log", "merge", str(source), "--into", str(tmp_path / "all")])
    assert not ended.value.code
    assert "3 lines added, 3 in all" in capsys.readouterr().out


def test_a_log_that_is_not_there_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"has no trial in it; expected a tuning log"):
        export_t4(TuningLog(tmp_path / "absent"), tmp_path / "t4")
    assert not (tmp_path / "t4").exists()


def test_t4_has_every_trial_with_its_status_and_times_in_ms(tmp_path: Path) -> None:
    log = TuningLog(tmp_path / "log")
    statuses: tuple[Status, ...] = tuple(INVALIDITY)
    for number, status in enumerate(statuses):
        times = (1500.0, 1700.0) if status == "ok" else ()
        log.append(trial_line(number, "r16t64f32", status=status, latency_us=times, compile_s=0.25))
    log.append(trial_line(9, "r16t64f32", workload="long", latency_us=(1.0,)))
    paths = export_t4(log, tmp_path / "t4")
    assert [path.name for path in paths] == ["r16t64f32.t4.json", "r16t64f32-2.t4.json"]
    found = json.loads(paths[0].read_text())
    assert found["schema_version"] == "1.0.0"
    allowed = {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
    assert [each["invalidity"] for each in found["results"]] == [INVALIDITY[s] for s in statuses]
    assert {each["invalidity"] for each in found["results"]} == allowed
    good = found["results"][statuses.index("ok")]
    assert good["configuration"] == {"rows": 8} and good["correctness"] == 1.0
    assert good["times"] == {"runtimes": [1.5, 1.7], "compilation_time": 250.0}
    assert {"name": "time", "value": 1.6, "unit": "ms"} in good["measurements"]
    for each in found["results"]:
        assert each.keys() >= {"configuration", "times", "invalidity", "correctness"}


@pytest.mark.parametrize("device", ["../elsewhere", "/elsewhere", "..", ""])
def test_a_line_of_no_device_is_written_nowhere(device: str, tmp_path: Path) -> None:
    source = place(write(tmp_path / "one", "a", 1, "2026-11-20T10:00:00+00:00"))
    lines = [msgspec.json.decode(line) for line in source.path.read_bytes().splitlines()]
    foreign = [msgspec.json.encode(line | {"device": device}) + b"\n" for line in lines]
    source.path.write_bytes(b"".join(foreign))
    with pytest.raises(LogError, match=r"device is .*; expected letters, digits, - and _"):
        merge([tmp_path / "one"], tmp_path / "all")
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "all").exists()

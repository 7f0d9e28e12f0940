"""`deft-tvm build` and `deft-tvm info`: what is made of which logs, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from commands import Ran
from comparable import run_line, trial_line
from small import SPEC, module
from toy_artifact import OTHER, manifest_for

from deft_tvm.build import Decisions
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import PlanError
from deft_tvm.manifest import DEFAULT, MODULE, cache_directory, read_manifest, write_artifact
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.log import TuningLog

pytestmark = pytest.mark.usefixtures("own_folders")

TIME = "2026-11-21T10:00:00+00:00"


def test_build_writes_a_module_that_info_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Ran(capsys, "build", "--spec", str(SPEC), "--out", str(tmp_path / "m"), "--json").json
    assert (tmp_path / "m" / MODULE).is_file()
    assert built["manifest"]["spec"] == str(SPEC)
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", str(tmp_path))
    found = Ran(capsys, "info", "--json").json
    assert found["device"]["slug"] == DeviceProfile.detect().slug
    assert [entry["path"] for entry in found["modules"]] == [str(tmp_path / "m")]
    assert read_manifest(tmp_path / "m").spec == found["modules"][0]["spec"]
    assert str(tmp_path / "m") in Ran(capsys, "info").out


class Builder:
    """In the place of `deft_tvm.build.build`: writes empty modules at once, and may fail."""

    def __init__(self, not_a_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = not_a_module
        self.fails: dict[AttentionSpec, Exception] = {}
        self.made: dict[AttentionSpec, str] = {}
        """What was built, and where its decision for `merge` comes from."""
        monkeypatch.setattr("deft_tvm.build.build", self)

    def __call__(
        self, spec: AttentionSpec, device: DeviceProfile, *, out: Path | None, decisions: Decisions
    ) -> Path:
        if spec in self.fails:
            raise self.fails[spec]
        self.made[spec] = decisions.origin.get("merge", DEFAULT)
        manifest = manifest_for(spec=str(spec), device=device.slug)
        return write_artifact(out or cache_directory(spec, device), manifest, self.module)


@pytest.fixture
def builder(not_a_module: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(not_a_module, monkeypatch)


def write_log(folder: Path, spec: AttentionSpec, trial: int = 0) -> TuningLog:
    log = TuningLog(folder / spec.slug)
    log.append(trial_line(trial, "merge", spec=str(spec), latency_us=(1.0,), time=TIME))
    return log


@pytest.fixture
def two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The device's logs, in the order in which they are looked for."""
    roots = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: roots)
    return [root / DeviceProfile.detect().slug for root in roots]


def test_build_all_takes_every_log_of_the_device(
    tmp_path: Path,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    two_folders: list[Path],
) -> None:
    first, second = two_folders
    here = second.name
    write_log(first, SPEC, trial=3)
    write_log(second, SPEC, trial=4)
    write_log(second, OTHER, trial=5)
    write_log(second.with_name("another-device"), AttentionSpec.parse("gqa:hq=1,hkv=1,d=16"))
    ran = Ran(capsys, "build", "--all", "--out", str(tmp_path / "out"))
    assert ran.code == 0
    assert builder.made == {
        SPEC: f"{here} trial 3, {TIME}",
        OTHER: f"{here} trial 5, {TIME}",
    }
    for spec in (SPEC, OTHER):
        folder = tmp_path / "out" / here / spec.slug
        assert read_manifest(folder).spec == str(spec)
        assert f"module written to {folder}\n" in ran.out
    cached = Ran(capsys, "build", "--all", "--json").json
    assert [entry["manifest"]["spec"] for entry in cached["modules"]] == [str(SPEC), str(OTHER)]
    assert cached["modules"][0]["module"].endswith(f"deft_tvm/modules/{here}/{SPEC.slug}")


def test_a_tuning_that_was_stopped_hides_no_log_that_was_finished(
    builder: Builder, capsys: pytest.CaptureFixture[str], two_folders: list[Path]
) -> None:
    first, second = two_folders
    here = second.name
    (first / SPEC.slug).mkdir(parents=True)
    stopped = TuningLog(first / SPEC.slug)
    stopped.path.write_bytes(b'{"type":"ru')
    finished = write_log(second, SPEC, trial=4)
    for _ in range(2):
        assert Ran(capsys, "build", "--all").code == 0
        assert builder.made == {SPEC: f"{here} trial 4, {TIME}"}
        told = Ran(capsys, "info", "--spec", str(SPEC)).out
        assert f"a module built from the log {finished.directory}\n" in told
        stopped.append(run_line(spec=str(SPEC), device=here))
    stopped.append(trial_line(1, "r4t16f32", spec=str(SPEC)))
    told = Ran(capsys, "info", "--spec", str(SPEC)).out
    assert f"from the log {stopped.directory} and the log {finished.directory}\n" in told


def test_one_spec_that_fails_does_not_stop_the_others(
    tmp_path: Path,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / DeviceProfile.detect().slug
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path])
    first, last = (AttentionSpec.parse(f"gqa:hq={n},hkv=1,d=16") for n in (1, 9))
    builder.fails = {first: PlanError("a decision is 7; expected 8"), SPEC: ValueError("a fault")}
    for spec in (first, SPEC, last):
        write_log(root, spec)
    TuningLog(root / OTHER.slug).append(run_line(spec=str(OTHER)))  # begun, nothing tried
    damaged = root / "damaged" / "trials.jsonl"
    damaged.parent.mkdir()
    damaged.write_text("{")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # nothing will be packed
    ran = Ran(capsys, "build", "--all", "--wheel", str(tmp_path / "dist"))
    assert ran.code == 1
    assert set(builder.made) == {OTHER, last}
    assert f"deft-tvm: {first}: a decision is 7; expected 8\n" in ran.err
    assert f"deft-tvm: {damaged.parent}: {damaged} has no line that can be read; exp" in ran.err
    assert f"deft-tvm: {SPEC}: a fault\n" in ran.err
    assert "Traceback" in ran.err
    assert list((tmp_path / "dist").iterdir()) == []
    told = Ran(capsys, "build", "--spec", str(first), "--spec", str(last), "--json").json
    assert told["failed"] == [{"name": str(first), "error": "a decision is 7; expected 8"}]
    assert [entry["manifest"]["spec"] for entry in told["modules"]] == [str(last)]
    assert Ran(capsys, "build", "--spec", str(first)).code == 2


def test_build_takes_a_folder_of_logs_as_the_device(
    tmp_path: Path, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, folder = DeviceProfile.nominal(cores=7), tmp_path / "copied"
    write_log(folder, SPEC, trial=6)
    device = ("--device", str(folder))
    assert f"{folder / 'device.json'}: No such file" in Ran(capsys, "build", "--all", *device).err
    elsewhere.write(folder / "device.json")
    built = Ran(capsys, "build", "--all", *device, "--json").json["modules"]
    assert [entry["manifest"]["device"] for entry in built] == [elsewhere.slug]
    assert builder.made == {SPEC: f"copied trial 6, {TIME}"}
    out = tmp_path / "out"
    Ran(capsys, "build", "--spec", str(OTHER), "--spec", str(SPEC), *device, "--out", str(out))
    assert builder.made[OTHER] == DEFAULT
    assert read_manifest(out / elsewhere.slug / OTHER.slug).spec == str(OTHER)


def test_build_packs_what_it_built(
    tmp_path: Path, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hatchling", reason="hatchling packs wheels")
    specs, dist = ("--spec", str(SPEC), "--spec", str(OTHER)), ("--wheel", str(tmp_path / "dist"))
    wheel = Path(Ran(capsys, "build", *specs, *dist, "--json").json["wheel"])
    assert wheel.parent == tmp_path / "dist"
    packed = {name.split("/")[2] for name in ZipFile(wheel).namelist() if name.endswith(".so")}
    assert packed == {SPEC.slug, OTHER.slug}
    out = tmp_path / "module"
    ran = Ran(capsys, "build", "--spec", str(SPEC), "--out", str(out), *dist)
    assert ran.out.endswith(f"module written to {out}\nwheel written to {wheel}\n")
    packed = {name.split("/")[2] for name in ZipFile(wheel).namelist() if name.endswith(".so")}
    assert packed == {SPEC.slug}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--all", "--spec", "gqa:hq=1"), "--all is given beside --spec gqa:hq=1; expected one of"),
        (("--all",), "--all finds no log of "),
        (("--spec", str(SPEC), "--spec", "nsa:hq=4"), "starts with 'nsa'; expected one of gqa"),
        (("--wheel", "/dev/null"), "/dev/null cannot be written: /dev/null: File exists; expected"),
    ],
)
def test_build_refuses_before_anything_is_built(
    arguments: tuple[str, ...],
    sentence: str,
    builder: Builder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    ran = Ran(capsys, "build", *arguments)
    assert (ran.code, ran.out, builder.made) == (2, "", {})
    assert sentence in ran.err


@pytest.mark.parametrize("date", ["abc", "", "-1", "0", "4354819200"])
def test_a_wheel_of_no_date_is_refused_before_anything_is_built(
    date: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deft_tvm.build.build", None)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
    ran = Ran(capsys, "build", "--spec", str(SPEC), "--wheel", str(tmp_path))
    assert ran.code == 2
    assert f"SOURCE_DATE_EPOCH is {date!r}; expected seconds since 1970 from" in ran.err


def test_without_hatchling_no_wheel_is_begun(
    builder: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "hatchling" else name
    )
    ran = Ran(capsys, "build", "--wheel", "/dist")
    assert (ran.code, ran.out, builder.made) == (2, "", {})
    assert "--wheel needs hatchling; run `pip install '.[tune]'`" in ran.err


def test_info_says_which_module_a_spec_gets_and_why(
    tmp_path: Path,
    not_a_module: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path / "logs"])
    named, cached = tmp_path / "named", tmp_path / "xdg_cache_home" / "deft_tvm" / "modules"
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", str(named))
    asked = ("info", "--spec", str(SPEC))

    def default() -> Any:
        return Ran(capsys, *asked, "--json").json["search"]["default"]

    built = "nothing else fits; built and kept when it is first used"
    assert default() == {"decisions": "the defaults that ship", "taken": True, "reason": built}
    log = write_log(tmp_path / "logs" / DeviceProfile.detect().slug, SPEC)
    assert default()["decisions"] == f"the log {log.directory}"
    monkeypatch.setattr("deft_tvm.commands.choice.is_installed", lambda name: False)
    assert default()["reason"].startswith("no compiler to build it; run `pip install '.[tune]'`")

    write_artifact(named / "other", manifest_for(spec=str(OTHER)), not_a_module)
    write_artifact(named / "good", manifest_for(), not_a_module)
    kept = write_artifact(cached / "device" / "spec", manifest_for(), not_a_module)
    (kept / MODULE).write_bytes(b"something else")
    ran, told = Ran(capsys, *asked), Ran(capsys, *asked, "--json").json
    assert told["shares"] and "KV bytes" in ran.out
    assert default()["reason"] == "not needed"
    first, last = told["search"]["places"]
    assert (first["origin"], first["folder"]) == ("DEFT_TVM_MODULE_PATH", str(named))
    assert (last["origin"], last["folder"]) == ("the user's cache", str(cached))
    good, other = first["modules"]
    whole = {"taken": True, "reason": "in a folder that the user named", "damage": ""}
    assert good == {"path": str(named / "good"), **whole}
    assert not other["taken"] and other["reason"].startswith("manifest.json: spec is 'gqa:hq=8")
    (second,) = last["modules"]
    assert second["reason"] == "not in a folder that the user named"
    assert second["damage"].startswith(f"{kept / MODULE}: sha256 is ")
    lines = [line.strip() for line in ran.out.splitlines()]
    assert lines.index(f"{named} (DEFT_TVM_MODULE_PATH)") < lines.index(str(named / "good"))
    assert lines[lines.index(str(named / "good")) + 1] == f"taken: {good['reason']}"
    assert lines[lines.index(str(kept)) + 1] == f"passed over: {second['reason']}"
    assert lines[lines.index(str(kept)) + 2] == f"but {second['damage']}"


def test_info_says_what_to_do_where_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path])
    ran = Ran(capsys, "info")
    assert DeviceProfile.detect().slug in ran.out
    assert "no log: `deft-tvm tune` makes one" in ran.out
    assert "no module: `deft-tvm build` makes one" in ran.out


def test_info_tells_what_a_spec_caches(capsys: pytest.CaptureFixture[str]) -> None:
    mla = "mla:hq=128,d=512,rope=64,dtype=bf16,page=64,scale=0.0721"
    lines = Ran(capsys, "info", "--spec", mla).out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("devices"))
    assert lines[header + 2].split()[:4] == ["2", "64/1", "1152", "1152"]
    found = Ran(capsys, "info", "--spec", mla, "--json").json
    assert found["shares"][0]["kv_bytes"] == 1152 and found["ridge"] > 0
    assert Ran(capsys, "info", "--spec", "mla:hq=1").code == 2
    half, single = (
        Ran(capsys, "info", "--spec", f"gqa:hq=4,hkv=2,d=64,dtype={dtype}", "--json").json["ridge"]
        for dtype in ("f16", "f32")
    )
    assert half == single, "a CPU multiplies float16 as float32"


def test_info_tells_what_each_attention_of_a_model_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("info", "--model", str(tmp_path))
    refused = Ran(capsys, *arguments)
    assert refused.code == 2 and "there is neither dtype nor torch_dtype" in refused.err
    names = [
        f"gqa:hq=64,hkv=8,d=64,dtype=bf16,page=16,layout=nhd,{window}sinks=yes"
        for window in ("window=128,", "")
    ]
    text = Ran(capsys, *arguments, "--dtype", "bf16").out
    assert [line for line in text.splitlines() if line.startswith("gqa:")] == names
    assert text.count("KV bytes: of a token") == 1
    found = Ran(capsys, *arguments, "--dtype", "bfloat16", "--json").json
    assert found["model"] == str(tmp_path)
    assert found["specs"] == [Ran(capsys, "info", "--spec", name, "--json").json for name in names]


def test_info_counts_damaged_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path])
    log = tmp_path / DeviceProfile.detect().slug / SPEC.slug / "trials.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"schema": 1, "run"\nnonsense\n')
    assert "0 trials, 0 of them good; 2 damaged lines skipped" in Ran(capsys, "info").out
    assert Ran(capsys, "info", "--json").json["logs"][0]["skipped"] == 2


def test_info_lists_a_log_of_a_newer_version_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path])
    device = tmp_path / DeviceProfile.detect().slug
    newer, other = write_log(device, SPEC), write_log(device, OTHER)
    newer.path.write_bytes(newer.path.read_bytes().replace(b'"schema":2', b'"schema":3'))
    why = f"{newer.path}: schema is 3; expected 2 or older: update deft_tvm"
    ran, told = Ran(capsys, "info"), Ran(capsys, "info", "--json").json["logs"]
    assert ran.code == 0
    assert f"{newer.directory}\n    {why}\n" in ran.out
    assert f"{other.directory}\n    1 trials, 1 of them good\n" in ran.out
    assert {log["path"]: log["refused"] for log in told} == {
        str(newer.directory): why,
        str(other.directory): "",
    }
    ran = Ran(capsys, "info", "--spec", str(SPEC))
    assert ran.code == 0 and "KV bytes" in ran.out
    assert f"a module built from a log that cannot be read\n        passed over: {why}" in ran.out


def test_info_measures_where_the_profile_is_damaged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = DeviceProfile.detect()
    monkeypatch.setattr("deft_tvm.tuning.probe.probe", lambda: here)
    path = Path(Ran(capsys, "info", "--measure", "--json").json["profile"])
    path.write_bytes(path.read_bytes().replace(b'"read_bandwidth": ', b'"read_bandwidth": -'))
    for refused in (Ran(capsys, "info"), Ran(capsys, "show", "plan", "few_shot")):
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith(f"deft-tvm: device profile {path} cannot be read: Expected")
        assert "or run `deft-tvm info --measure`, to measure the device again" in refused.err
    assert Ran(capsys, "info", "--measure").code == 0
    assert Ran(capsys, "info").code == 0
    assert DeviceProfile.read(path) == here


def test_build_takes_the_profile_that_info_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, targets = DeviceProfile.nominal(cores=7), []

    def build(_: AttentionSpec, device: DeviceProfile, **options: Any) -> Path:
        targets.append(device)
        return module()

    monkeypatch.setattr("deft_tvm.tuning.probe.probe", lambda: elsewhere)
    profile = Ran(capsys, "info", "--measure", "--json").json["profile"]
    assert f"profile written to {profile}" in Ran(capsys, "info", "--measure").out
    module()  # before the builder is replaced
    monkeypatch.setattr("deft_tvm.build.build", build)
    assert Ran(capsys, "build", "--device", profile).code == 0
    assert targets == [elsewhere]

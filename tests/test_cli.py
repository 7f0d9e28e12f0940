"""The command line as a user meets it: text, JSON, refusals and exit codes."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from small import FEW_SHOT, SPEC, module

from deft_tvm import check as checking
from deft_tvm.cli import main
from deft_tvm.device import DeviceProfile
from deft_tvm.manifest import MODULE, read_manifest

COMMANDS = ("tune", "build", "check", "bench", "info", "show")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's logs and modules nor those that ship."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "DEFT_TVM_LOGS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("COLUMNS", "80")


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        self.code = end.value.code or 0
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_and_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overview, ran = Ran(capsys, "--help"), Ran(capsys, command, "--help")
    assert overview.code == ran.code == 0
    assert f" {command} " in overview.out
    assert command == "show" or f"Example: deft-tvm {command}" in ran.out


@pytest.mark.parametrize("drawing", ["tree", "plan", "tir", "source"])
def test_every_drawing_has_help(drawing: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "show", drawing, "--help")
    assert ran.code == 0
    assert f"Example: deft-tvm show {drawing}" in ran.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("check", "few_shots"), "workload 'few_shots' starts with 'few_shots'; expected one of"),
        (("check", "few_shot:prompt=-1"), "prompt is '-1'; expected a whole number from 1 on"),
        (("bench", "--spec", "mla:hq=4"), "starts with 'mla'; expected gqa or kv"),
        (("show", "plan", "--grouping", "best"), "grouping is 'best'; expected one of node"),
        (("show", "tir", "--kernel", "gemm"), "kernel is 'gemm'; expected one of "),
        (("build", "--device", "/nowhere.json"), "device profile /nowhere.json"),
        (("check", "--module", "/nowhere"), "/nowhere/manifest.json"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("deft-tvm: ")
    assert ran.err.count("\n") == 1
    assert sentence in ran.err


@pytest.mark.parametrize("arguments", [("tunes",), ("check", "--fast"), ("tune", "--trials", "0")])
def test_wrong_use_exits_with_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, *arguments)
    assert ran.code == 2
    assert "Usage: deft-tvm" in ran.err


def test_check_is_exact_and_counts_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("check", FEW_SHOT, "--spec", str(SPEC), "--module", str(module()))
    text, found = Ran(capsys, *arguments), Ran(capsys, *arguments, "--json").json
    assert text.code == 0
    assert text.out.rstrip().endswith("\nexact")
    assert "KV bytes saved" in text.out
    assert found["exact"] is True
    assert 0 < found["exactness"]["out_error"] <= found["exactness"]["out_bound"]
    assert 0 < found["kv_saved_percent"] < 100


def test_check_that_fails_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "largest_error", lambda *_: 1.0)
    ran = Ran(capsys, "check", FEW_SHOT, "--spec", str(SPEC), "--module", str(module()))
    assert ran.code == 1
    assert "NOT exact" in ran.out


def test_bench_tells_how_much_faster(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--peers", "masked", "--seconds", "0.01", "--between", "--module", str(module()))
    arguments = ("bench", FEW_SHOT, "--spec", str(SPEC), *options)
    text, found = Ran(capsys, *arguments), Ran(capsys, *arguments, "--json").json
    assert "SDPA masked" in text.out
    assert "between two matrix products" in text.out
    assert set(found["measurement"]["timings"]) == {"deft_tvm", "masked"}
    assert found["speedups"]["masked"]["median"] > 0


def test_bench_names_unknown_peers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", FEW_SHOT, "--spec", str(SPEC), "--module", str(module()))
    ran = Ran(capsys, *arguments, "--peers", "flash")
    assert ran.code == 2
    assert "peer is 'flash'; expected one of sequences, folded, batched, masked" in ran.err


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


def test_info_says_what_to_do_where_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_tvm.tuning.log.log_roots", lambda: [tmp_path])
    ran = Ran(capsys, "info")
    assert DeviceProfile.detect().slug in ran.out
    assert "no log: `deft-tvm tune` makes one" in ran.out
    assert "no module: `deft-tvm build` makes one" in ran.out


def test_show_draws_trees_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "100 tokens" in Ran(capsys, "show", "tree", FEW_SHOT).out
    assert "packed" in Ran(capsys, "show", "plan", FEW_SHOT, "--spec", str(SPEC)).out
    assert Ran(capsys, "show", "plan", "--svg", str(tmp_path / "plan.svg")).out == ""
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


def test_show_prints_programs(capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("--spec", str(SPEC), "--kernel", "merge")
    written = Ran(capsys, "show", "tir", *merge, "--unscheduled").out
    scheduled = Ran(capsys, "show", "tir", *merge).out
    assert "def merge(" in written
    assert "merge" in scheduled
    assert written != scheduled
    assert ".text" in Ran(capsys, "show", "source", *merge).out


@pytest.mark.parametrize("command", [("tune",), ("build",), ("show", "tir"), ("show", "source")])
def test_without_the_compiler_commands_say_how_to_get_it(
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = Ran(capsys, *command)
    assert ran.code == 2
    assert f"`deft-tvm {' '.join(command)}` needs the compiler" in ran.err
    assert "pip install 'deft-tvm[tune]'" in ran.err


def test_without_typer_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_commands(name: str, *rest: Any) -> Any:
        if name == "deft_tvm.commands":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_commands)
    ran = Ran(capsys, "info")
    assert ran.code == 2
    assert "typer is not installed; run `pip install 'deft-tvm[cli]'`" in ran.err

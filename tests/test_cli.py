"""The command line as a user meets it: text, JSON, refusals and exit codes."""

from __future__ import annotations

import builtins
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Ran
from small import FEW_SHOT, SPEC, module

from deft_tvm import check as checking
from deft_tvm import env
from deft_tvm.bench import Cell
from deft_tvm.bench.compare import Change, Verdict
from deft_tvm.cli import end_with_code, main
from deft_tvm.commands import app, log, show
from deft_tvm.commands.common import console
from deft_tvm.device import DeviceProfile
from deft_tvm.workloads import parse

pytestmark = pytest.mark.usefixtures("own_folders")

COMMANDS = ("tune", "serve-device", "build", "check", "bench", "info", "show")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_and_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overview, ran = Ran(capsys, "--help"), Ran(capsys, command, "--help")
    assert overview.code == ran.code == 0
    assert f" {command} " in overview.out
    assert command == "show" or f"Example: deft-tvm {command}" in ran.out


NUMBERS = [
    ((*group, command.callback.__name__.replace("_", "-")), f"--{name}")
    for group, commands in (((), app), (("log",), log), (("show",), show))
    for command in commands.registered_commands
    if command.callback is not None
    for name, parameter in inspect.signature(command.callback).parameters.items()
    if "float" in str(parameter.annotation) or parameter.annotation == "ApartOption"
]


@pytest.mark.parametrize(("command", "option"), NUMBERS)
@pytest.mark.parametrize("text", ["nan", "inf"])
def test_numbers_of_options_are_finite(
    command: tuple[str, ...], option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, *command, option, text)
    assert ran.code == 2
    assert f"'{option}'" in ran.err


def test_options_that_are_numbers_are_found() -> None:
    assert len(NUMBERS) >= 5
    assert {(("tune",), "--minutes"), (("log", "measure"), "--apart")} < {*NUMBERS}


@pytest.mark.parametrize("drawing", ["tree", "plan", "tir", "source"])
def test_every_drawing_has_help(drawing: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "show", drawing, "--help")
    assert ran.code == 0
    assert f"Example: deft-tvm show {drawing}" in ran.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("check", "few_shots"), "workload 'few_shots' starts with 'few_shots'; expected one of"),
        (("check", "recorded:path=/no.json"), "/no.json: No such file or directory; expected a"),
        (("tune", "recorded:step=3"), "has no path; expected recorded:path=FILE"),
        (("check", "few_shot:prompt=-1"), "prompt is '-1'; expected a whole number from 1 on"),
        (("bench", "--spec", "nsa:hq=4"), "starts with 'nsa'; expected one of gqa, gta, mla"),
        (("bench", "core", "--cold", "--spec", str(SPEC)), "--spec, --cold with core, whose cells"),
        (("show", "plan", "--grouping", "best"), "grouping is 'best'; expected one of node"),
        (("show", "tir", "--kernel", "gemm"), "kernel is 'gemm'; expected one of "),
        (("build", "--device", "/nowhere.json"), "device profile /nowhere.json"),
        (("serve-device", "--tracker", "here"), "tracker is 'here'; expected HOST:PORT, as in 127"),
        (("log", "measure", "/nowhere", "--into", "/x"), "/nowhere is no folder; expected a"),
        (("check", "--module", "/nowhere"), "/nowhere/manifest.json"),
        (("show", "plan", "--svg", "/no/dir/x.svg"), "/no/dir/x.svg: No such file or directory"),
        (("info", "--model", "/no"), "/no: No such file or directory; expected a model's folder"),
        (("info", "--model", "/no", "--spec", "gqa:"), "and --model '/no'; expected one of them"),
        (
            ("show", "tree", "recorded:path=~no-such-user/x"),
            "x': Could not determine home directory",
        ),
        (("info", "--dtype", "f16"), "--dtype is 'f16' and there is no --model; expected both"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ("tunes",),
        ("check", "--fast"),
        ("tune", "--trials", "0"),
        ("check", "--seed", "-1"),
        ("tune", "--apart", "inf"),
        ("tune", "--minutes", "inf"),
    ],
)
def test_wrong_use_exits_with_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capsys, *arguments)
    assert ran.code == 2
    assert "Usage: deft-tvm" in ran.err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("deft_tvm.build.lower", None)
    out = tmp_path / "file" / "m"
    for options in ((), ("--json",)):
        ran = Ran(capsys, "build", "--spec", str(SPEC), "--out", str(out), *options)
        assert (ran.code, ran.out) == (2, "")
        sentence = f"{out} cannot be written: {out.parent}: File exists; expected a folder that can"
        assert ran.err == f"deft-tvm: {sentence}\n"


def test_build_replaces_nothing_but_a_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    monkeypatch.setattr("deft_tvm.build.lower", None)
    ran = Ran(capsys, "build", "--spec", str(SPEC), "--out", str(tmp_path / "work"))
    assert ran.code == 2
    assert "work has 'thesis.tex' in it; expected a new folder, or one with nothing but" in ran.err
    ran = Ran(capsys, "build", "--spec", str(SPEC), "--out", str(tmp_path / "work" / "thesis.tex"))
    assert "thesis.tex: Not a directory; expected a folder" in ran.err
    assert (tmp_path / "work" / "thesis.tex").is_file()


def test_build_does_not_replace_the_folder_in_which_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("deft_tvm.build.lower", None)
    for name in (".", str(tmp_path / "here")):
        ran = Ran(capsys, "build", "--spec", str(SPEC), "--out", name)
        assert ran.code == 2
        assert f"{name} is the folder in which this runs; expected another one" in ran.err


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", "1.05? ??"), ("iso-8859-1", "1.05\xd7 ??"), ("utf-8", "1.05× ├─")],
)
def test_text_is_printed_in_any_encoding(
    encoding: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding))
    with pytest.raises(SystemExit):
        end_with_code(lambda: console().print("1.05× ├─"))
    for arguments in (["tree"], ["tree", "--json"]):
        with pytest.raises(SystemExit) as end:
            main(["show", *arguments])
        assert not end.value.code
    sys.stdout.flush()
    assert out.getvalue().startswith(f"{printed}\n".encode(encoding))
    assert out.getvalue().endswith(b"}\n")


def test_tune_is_refused_before_it_begins_where_its_module_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("deft_tvm.tuning.tune.tune", None)
    ran = Ran(capsys, "tune", "--spec", str(SPEC))
    assert ran.code == 2
    assert ran.err.startswith(f"deft-tvm: {tmp_path / 'file'}")
    assert ran.err.count("\n") == 1
    assert ": Not a directory; expected a folder" in ran.err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ZeroDivisionError("by nothing"), 70, "Traceback"),
        (ModuleNotFoundError("No module named 'new'", name="new"), 70, "Traceback"),
        (OSError("no room"), 2, "deft-tvm: no room\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_a_check_that_failed_exits_with_1(
    error: BaseException,
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(DeviceProfile, "detect", fail)
    ran = Ran(capsys, "info")
    assert ran.code == code
    assert ran.err.startswith(told)
    assert ("Traceback" in ran.err) == (code == 70)


def test_check_is_exact_and_counts_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    # So long a prompt is shared whatever the device's prices are.
    workload = "few_shot:prompt=1000,branches=8,tokens=9"
    arguments = ("check", workload, "--spec", str(SPEC), "--module", str(module()))
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
    assert "masked: SDPA, one masked call" in text.out
    assert "between two matrix products" in text.out
    (measurement,) = found["record"]["measurements"]
    assert {"deft_tvm", "masked"} < set(measurement["timings"])


def test_bench_keeps_a_record_and_compares_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--peers", "", "--seconds", "0.01", "--module", str(module()))
    arguments = ("bench", FEW_SHOT, "--spec", str(SPEC), *options)
    kept = str(tmp_path / "record.jsonl")
    assert Ran(capsys, *arguments, "--out", kept).code == 0
    monkeypatch.setattr("deft_tvm.bench.compare.SMALLEST", float("inf"))
    assert Ran(capsys, *arguments, "--compare", kept).code == 0
    monkeypatch.setattr(Change, "verdict", Verdict.SLOWER)
    slower = Ran(capsys, *arguments, "--compare", kept)
    assert slower.code == 1
    assert "slower" in slower.out


def test_bench_refuses_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it could not keep, or not compare."""
    options = ("--peers", "", "--seconds", "0.01", "--module", str(module()))
    kept = tmp_path / "record.jsonl"
    assert (
        Ran(capsys, "bench", FEW_SHOT, "--spec", str(SPEC), *options, "--out", str(kept)).code == 0
    )
    monkeypatch.setattr("deft_tvm.bench.measure", None)
    monkeypatch.setattr("deft_tvm.bench.run.measure", None)

    def told(*arguments: str) -> str:
        ran = Ran(capsys, "bench", *arguments)
        assert (ran.code, ran.out) == (2, "") and ran.err.count("\n") == 1
        return ran.err

    for name, why in (("", "Is a directory"), ("record.jsonl/new", "File exists")):
        path = str(tmp_path / name) if name else str(tmp_path)
        assert f"{path} cannot be written: {why}" in told(FEW_SHOT, *options, "--out", path)
        assert f"{path} cannot be written: {why}" in told("core", "--only", "beam", "--out", path)
    beside = ("--compare", str(kept))
    assert "has 1 other measurements; expected some of the same, as of beam" in told(
        "core", "--only", "beam", *beside
    )
    kept.write_bytes(kept.read_bytes().replace(DeviceProfile.detect().slug.encode(), b"elsewhere"))
    here = ("--spec", str(SPEC))
    assert "is of elsewhere; expected one of" in told(FEW_SHOT, *here, *options, *beside)


def test_bench_measures_core_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deft_tvm.bench.CORE", (Cell(FEW_SHOT, str(SPEC)), Cell("beam", "gqa:hq=9"))
    )
    monkeypatch.setenv(env.MODULE_PATH.name, str(module()))
    options = ("--only", "few_shot", "--peers", "masked", "--seconds", "0.01")
    found = Ran(capsys, "bench", "core", *options, "--json").json["record"]["measurements"]
    assert [each["workload"] for each in found] == [parse(FEW_SHOT).name]
    assert set(found[0]["groupings"]) > {"deft_tvm", "node", "flatten"}
    assert Ran(capsys, "bench", "core", "--only", "nothing").code == 2
    assert Ran(capsys, "bench", "few_shot", "--only", "beam").code == 2


def test_bench_names_unknown_peers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", FEW_SHOT, "--spec", str(SPEC), "--module", str(module()))
    ran = Ran(capsys, *arguments, "--peers", "flash")
    assert ran.code == 2
    assert "peer is 'flash'; expected one of sequences, folded, batched, masked" in ran.err


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
    assert "pip install '.[tune]'" in ran.err


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
    assert "typer is not installed; run `pip install '.[cli]'`" in ran.err


def test_a_file_that_cannot_be_written_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(("show", "tree", "long", "--svg", "/no/such/folder/tree.svg"))
    assert end.value.code == 2
    assert "/no/such/folder/tree.svg" in capsys.readouterr().err


def test_a_fault_of_ours_is_no_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deft_tvm.show.tree", lambda forest: 1 / 0)
    with pytest.raises(SystemExit) as end:
        main(("show", "tree", "long"))
    assert end.value.code == 70
    assert "ZeroDivisionError" in capsys.readouterr().err

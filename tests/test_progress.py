"""What long commands say while they work, and that it disturbs nothing."""

from __future__ import annotations

import threading

import pytest
from small import FEW_SHOT, SPEC, attention, module

from deft_tvm import bench, env
from deft_tvm.cli import main
from deft_tvm.commands.progress import line, told
from deft_tvm.tuning.result import Progress
from deft_tvm.workloads import parse, tensors


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_elsewhere_than_on_a_terminal_each_stage_is_one_plain_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "a path [of] " + 30 * "many/folders/"
    with told() as say:
        say("first")
        assert capsys.readouterr().err == "first\n", "said at once"
        say(long)
    assert capsys.readouterr() == ("", long + "\n")


def test_on_a_terminal_a_line_stands_without_a_thread_and_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    threads = threading.active_count()
    with told() as say:
        say("in [brackets]")
        assert threading.active_count() == threads
    told_there = capsys.readouterr()
    assert told_there.out == ""
    assert "in [brackets]" in told_there.err
    assert told_there.err.rstrip().endswith("\x1b[2K"), "the line is erased"


def said(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    """Lines on standard error of a command that finds the module on its search path."""
    with pytest.raises(SystemExit):
        main((*command, FEW_SHOT, "--spec", str(SPEC), "--json"))
    return capsys.readouterr().err.splitlines()


def test_check_and_bench_tell_of_each_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.MODULE_PATH.name, str(module()))
    begin = [
        "taking the best module, or building the default",
        f"random tensors for {parse(FEW_SHOT).name}",
    ]
    assert said(capsys, "check") == [*begin, "one step, and the same in float64"]
    options = ("--peers", "folded,masked", "--seconds", "0.01", "--between")
    assert said(capsys, "bench", *options) == [
        *begin,
        "gathering KV from its pages for the peers",
        "preparing folded",
        "preparing masked",
        "timing deft_tvm, folded, masked in turn, for 0.01 s or longer",
        "timing the plan, the partials and the merge alone",
        "timing a step between two matrix products",
    ]


def test_a_measurement_says_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    case = tensors(parse(FEW_SHOT).forest, SPEC)
    bench.measure(FEW_SHOT, case, attention(), ["masked"], budget=0.01)
    assert capsys.readouterr() == ("", "")


def test_a_tuning_tells_a_gain_where_there_is_one() -> None:
    event = Progress("search", "merge: ok", 3, 9, best_us=10.0, limit_us=5.0)
    assert line(event) == "[3/9] merge: ok · 50% of the limit"
    known = Progress("final", "merge: the winner", 3, 9, best_us=10.0, gain=1.25)
    assert line(known) == "[3/9] merge: the winner · 1.25× the default"

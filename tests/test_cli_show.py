"""`deft-tvm show`, and recorded trees as workloads of all commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Ran
from small import FEW_SHOT, SPEC, module

pytestmark = pytest.mark.usefixtures("own_folders")


def test_show_draws_trees_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "100 tokens" in Ran(capsys, "show", "tree", FEW_SHOT).out
    assert "packed" in Ran(capsys, "show", "plan", FEW_SHOT, "--spec", str(SPEC)).out
    assert Ran(capsys, "show", "plan", "--svg", str(tmp_path / "plan.svg")).out == ""
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


def test_recorded_trees_are_workloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafts = {"tree_structure": [[0], [1]], "records": [{"Accept_length": [2, 3]}]}
    (tmp_path / "trees.json").write_text(json.dumps([drafts]))
    workload = f"recorded:path={tmp_path / 'trees.json'},prompt=40"
    assert "42 tokens" in Ran(capsys, "show", "tree", workload).out
    found = Ran(capsys, "check", workload, "--spec", str(SPEC), "--module", str(module()), "--json")
    assert found.json["exact"] is True
    assert (
        found.json["workload"]
        == f"{workload.removesuffix(',prompt=40')},request=1,step=2,prompt=40"
    )


@pytest.mark.parametrize("command", ["tune", "check", "bench"])
def test_help_tells_of_recorded_trees(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "recorded:path=FILE" in Ran(capsys, command, "--help").out


def test_show_tells_trees_and_plans_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = "few_shot:prompt=100,branches=2,tokens=9"
    tree = Ran(capsys, "show", "tree", workload, "--json").json
    root, leaf = {"parent": -1, "length": 100, "rows": 0}, {"parent": 0, "length": 9, "rows": 1}
    assert tree == {"nodes": [root, leaf, leaf]}
    svg = tmp_path / "plan.svg"
    options = ("--grouping", "node", "--svg", str(svg), "--json")
    plan = Ran(capsys, "show", "plan", workload, *options).json
    assert svg.read_text().startswith("<svg")
    assert (plan["grouping"], plan["partials"]) == ("node", 4)
    items = sorted((item["rows"], item["tokens"], item["runs"]) for item in plan["items"])
    assert items == [
        ([0, 1], 9, [{"node": 1, "begin": 0, "end": 9}]),
        ([0, 2], 100, [{"node": 0, "begin": 0, "end": 100}]),
        ([1, 2], 9, [{"node": 2, "begin": 0, "end": 9}]),
    ]
    assert all(item["tile"].startswith("r") for item in plan["items"])


def test_show_prints_programs(capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("--spec", str(SPEC), "--kernel", "merge")
    written = Ran(capsys, "show", "tir", *merge, "--unscheduled").out
    scheduled = Ran(capsys, "show", "tir", *merge).out
    assert "def merge(" in written
    assert "merge" in scheduled
    assert written != scheduled
    assert ".text" in Ran(capsys, "show", "source", *merge).out
    assert Ran(capsys, "show", "tir", *merge, "--json").json == {"merge": scheduled.rstrip("\n")}
    assert ".text" in Ran(capsys, "show", "source", *merge, "--json").json["merge"]

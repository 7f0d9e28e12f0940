"""Copies of what decoding holds: deep ones, and those that another process unpickles."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built import SMALL, artifact
from torch import nn

from deft_tvm.artifact import Artifact
from deft_tvm.pytorch import PagedKVCache, TreeAttention, TreeAttentionModule
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}
CASE = tensors(parse("few_shot:prompt=90,branches=5,tokens=7").forest, SMALL)


@pytest.fixture
def attention() -> TreeAttention:
    made = TreeAttention(SMALL, artifact(SMALL), deterministic=True, grouping="node")
    made.plan(CASE.forest, CASE.pages)
    return made


@pytest.mark.parametrize("way", COPIES)
def test_an_attention(attention: TreeAttention, way: str) -> None:
    expected = attention.run(CASE.q, CASE.buffers)
    made = COPIES[way](attention)
    assert (made.deterministic, made.grouping, made.device) == (True, "node", torch.device("cpu"))
    assert made.artifact.directory == artifact(SMALL)
    if way == "pickle":
        assert made.last_plan is None
        made.plan(CASE.forest, CASE.pages)
    assert all(map(torch.equal, made.run(CASE.q, CASE.buffers), expected))
    other = made.plan(Forest.from_parents([-1], [3]), [0], [0, 1])
    assert made.last_plan is other and attention.last_plan is not other


def test_layers_that_share_one_attention_share_its_copy(attention: TreeAttention) -> None:
    layers = nn.ModuleList(TreeAttentionModule(attention) for _ in range(2))
    for made in (copy.deepcopy(layers), pickled(layers)):
        assert made[0].attention is made[1].attention is not attention


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("grouping", ["auto", "node"])
def test_a_plan(way: str, grouping: str) -> None:
    attention = TreeAttention(SMALL, artifact(SMALL), grouping=grouping)
    plan = attention.plan(CASE.forest, CASE.pages)
    expected = attention.run(CASE.q, CASE.buffers)
    made = COPIES[way](plan)
    other = TreeAttention(SMALL, artifact(SMALL))
    other.use(made)
    assert all(map(torch.equal, other.run(CASE.q, CASE.buffers), expected))
    grown = CASE.forest.with_lengths(CASE.forest.lengths + (CASE.forest.rows > 0))
    one, another = plan.update(grown, CASE.pages), made.update(grown, made.pages)
    assert np.array_equal(one.runs, another.runs) and np.array_equal(one.items, another.items)


@pytest.mark.parametrize("way", COPIES)
def test_a_module(way: str) -> None:
    loaded = Artifact.load(artifact(SMALL))
    made = COPIES[way](loaded)
    assert made.directory == loaded.directory and made.manifest == loaded.manifest


@pytest.mark.parametrize("way", COPIES)
def test_a_cache(way: str) -> None:
    cache = PagedKVCache([SMALL], 8, attention=[TreeAttention(SMALL, artifact(SMALL))])
    branch = cache.pool.root()
    rows = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0))
    cache.step({branch: 6}).write(0, rows, rows)
    made = COPIES[way](cache)
    cache.pool.prune(branch)
    assert torch.equal(made.read(branch, 0)[0], rows)
    assert made.step({branch: 1}).attend(0, torch.zeros(1, 4, 16), rows[:1], rows[:1]).any()


THERE = """
import pickle, sys
import torch

attention, plan, q, buffers, expected = pickle.load(open(sys.argv[1], "rb"))
attention.use(plan)
assert torch.equal(attention.run(q, buffers)[0], expected)
print("equal")
"""


def test_another_process_goes_on(attention: TreeAttention, tmp_path: Path) -> None:
    case: Case = CASE
    expected, _ = attention.run(case.q, case.buffers)
    file = tmp_path / "all.pickle"
    whole = (attention, attention.last_plan, case.q, case.buffers, expected)
    file.write_bytes(pickle.dumps(whole))
    command = [sys.executable, "-c", THERE, str(file)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "equal\n"

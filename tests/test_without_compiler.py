"""A built module is all that it takes: no compiler, and nothing that tunes or prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from built import SMALL, artifact

from deft_tvm.pytorch import TreeAttention
from deft_tvm.workloads import parse, tensors

WITHOUT = """
import sys
for name in ("tvm", "scipy", "xgboost", "typer", "rich"):
    sys.modules[name] = None
import torch
import deft_tvm as dt
given = torch.load(sys.argv[2])
attention = dt.load(sys.argv[1])
attention.plan(dt.Forest.from_parents(*given["forest"]), *given["pages"])
found = attention.run(given["q"], given["kv"])
assert all(torch.equal(a, b) for a, b in zip(found, given["outputs"], strict=True))
try:
    import tvm
except ImportError:
    print("ran without tvm")
"""


def test_a_module_loads_plans_and_runs_without_the_compiler(tmp_path: Path) -> None:
    case = tensors(parse("few_shot:prompt=90,branches=5,tokens=7").forest, SMALL)
    attention = TreeAttention(SMALL, artifact(SMALL))
    attention.plan(case.forest, case.pages)
    forest, pages = case.forest, case.pages
    given = {
        "forest": [array.tolist() for array in (forest.parents, forest.lengths, forest.rows)],
        "pages": [
            array.tolist() for array in (pages.page_indices, pages.page_indptr, pages.first_slot)
        ],
        "q": case.q,
        "kv": case.buffers,
        "outputs": attention.run(case.q, case.buffers),
    }
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", WITHOUT, str(artifact(SMALL)), str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran without tvm\n"

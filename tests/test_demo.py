"""The demo decodes the same logits as a tree and sequence by sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console, RenderableType
from small import FEW_SHOT, SPEC, attention, module

from deft_tvm.bench import measure
from deft_tvm.check import check
from deft_tvm.demo import job
from deft_tvm.demo.decode import (
    DECODE_STEPS,
    Cache,
    decode_each,
    decode_tree,
    prefill,
    rounding_nudge,
)
from deft_tvm.demo.job import Outcome
from deft_tvm.demo.model import Shape, Transformer, rotary_angles, rotate
from deft_tvm.demo.report import CALLS, introduction, report
from deft_tvm.demo.text import few_shot
from deft_tvm.device import DeviceProfile
from deft_tvm.exit_codes import WRONG_USE
from deft_tvm.peers import SDPA
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import TuningLog
from deft_tvm.workloads import parse, tensors

SHAPE = Shape(width=64, q_heads=8, kv_heads=2, head_width=64)
TEXT = few_shot(prompt=200, branches=5, longest=30)


def test_text_is_a_prompt_of_4000_bytes_and_branches_of_mixed_lengths() -> None:
    text = few_shot()
    assert bytes(text.prompt.tolist()).startswith(b"In Congress, July 4, 1776.")
    assert len(text.prompt) == 4000
    assert len(text.branches) == 32
    assert min(text.lengths) >= 16
    assert max(text.lengths) <= 96
    assert len(set(text.lengths)) == 32
    assert min(text.lengths) > DECODE_STEPS


def test_the_models_spec_is_the_modules() -> None:
    assert SHAPE.spec("float32") == SPEC


def test_the_same_seed_gives_the_same_weights() -> None:
    one, same, other = Transformer(SHAPE), Transformer(SHAPE), Transformer(SHAPE, seed=1)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    x, y = torch.randn(2, 1, 1, 64, dtype=torch.float32).unbind()
    near, far = (float((_at(x, p + 5) * _at(y, p)).sum()) for p in (3, 300))
    # 64 products of numbers up to about 3, each off by the angle's rounding: 300 · 2⁻²⁴.
    assert near == pytest.approx(far, abs=64 * 9 * 300 * 2**-24)
    torch.testing.assert_close(_at(x, 7).norm(), x.norm())


def test_cache_gives_back_what_was_written() -> None:
    cache = Cache(SPEC, 1, [20, 5])
    k, v = torch.randn(2, 5, 2, 64).unbind()
    cache.write(0, cache.slots(1, 0, 5), k, v)
    assert torch.equal(torch.stack(cache.read(0, cache.slots(1, 0, 5))), torch.stack([k, v]))
    assert not cache.read(0, cache.prompt)[0].any()


@torch.inference_mode()
def test_logits_as_a_tree_are_those_of_each_sequence() -> None:
    model, attn = Transformer(SHAPE), attention()
    cache = prefill(model, TEXT, SPEC)
    decoded = decode_tree(model, TEXT, cache, attn)
    each = decode_each(model, TEXT.branches, cache)
    moved = decode_each(model, TEXT.branches, cache, rounding_nudge(SPEC))
    bound = _apart(moved, each)
    assert [len(logits) for logits in decoded.logits] == TEXT.lengths
    assert 0 < _apart(decoded.logits, each) <= bound
    # The bound is worth something: it is far below what another token would do.
    assert bound < 1e-2 * float(torch.cat(each).std())


@torch.inference_mode()
def test_the_last_step_is_left_behind_as_a_case() -> None:
    attn = attention()
    model = Transformer(SHAPE)
    decoded = decode_tree(model, TEXT, prefill(model, TEXT, SPEC), attn)
    for case in decoded.cases:
        assert case.forest.lengths.tolist() == [200, *TEXT.lengths]
        assert check(case, attn).holds


def test_the_report_tells_all_and_whether_it_is_exact() -> None:
    attn = attention()
    case = tensors(parse(FEW_SHOT).forest, SPEC)
    measurement = measure("test", case, attn, SDPA, budget=0.01)
    found = Outcome("float32", check(case, attn), 1e-6, 1e-3, measurement, "the/log", "the/module")
    text = _printed(report([found]))
    for part in (*CALLS.values(), "exact", "the/log", "the/module", "saved"):
        assert part in text
    assert "NOT EXACT" in _printed(report([msgspec.structs.replace(found, logits_error=1e-2)]))
    assert "a prompt of 200, 5 branches" in introduction(TEXT, SHAPE, DeviceProfile.nominal())


def test_a_finished_log_is_taken_and_an_unfinished_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFT_TVM_LOGS", str(tmp_path))
    monkeypatch.setattr(job, "_module", lambda spec, device: module())
    log = TuningLog(tmp_path / DeviceProfile.detect().slug / SPEC.slug)
    common = {"kernel": "merge", "spec": str(SPEC), "workload": "beam", "decision": {}}
    trial = Trial(run="a", trial=0, status="ok", device="here", latency_us=(1.0,), **common)
    log.append(trial)
    assert not job._finished(log)
    log.append(msgspec.structs.replace(trial, trial=1, final=True))
    assert not job._finished(log), "the winner is measured after it was chosen"
    log.append(msgspec.structs.replace(trial, trial=2, final=True, alone=True))
    found, artifact = job.tuned(SPEC, None)
    assert found.directory == log.directory
    assert artifact == module()


def _printed(part: RenderableType) -> str:
    with StringIO() as file:
        Console(file=file, width=100).print(part)
        return file.getvalue()


def _apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return float((torch.cat(one) - torch.cat(other)).abs().max())


def _at(x: torch.Tensor, place: int) -> torch.Tensor:
    return rotate(x, rotary_angles(torch.tensor([place]), 64))


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    assert names["out"].shape == (2, 32, 128)
    assert names["lse"].isfinite().all()


@pytest.mark.parametrize("arguments", [(), ("--seconds", "inf")])
def test_a_demo_that_is_refused_ends_as_every_command_does(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "DEFT_TVM_LOGS": str(tmp_path / "file")}
    command = (sys.executable, "-m", "deft_tvm.demo", *arguments)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == WRONG_USE
    assert "Traceback" not in ran.stderr
    assert ("--seconds" if arguments else "deft-tvm: ") in ran.stderr

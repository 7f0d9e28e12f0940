"""When a comparison counts as failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparable import DEVICE, PASSES, ROUNDS, SPEC, equal, kernels, noisy, trial_line, write_log
from test_compare import STEADY, compared

from deft_tvm.compare.gates import Gates
from deft_tvm.errors import InputError
from deft_tvm.tuning.log import TuningLog


def test_gates_are_read_and_refused() -> None:
    assert Gates.parse("5%", ["missing", "geomean:2.5%"]) == Gates(0.05, 0.025, True)
    assert Gates.parse(None) == Gates()
    with pytest.raises(InputError, match=r"--fail-on-regression is '5'; expected percent, as in 5"):
        Gates.parse("5")
    for wrong in ("absent", "geomean", "geomean:x"):
        with pytest.raises(InputError, match="expected"):
            Gates.parse(None, [wrong])


def test_gates_name_what_failed(tmp_path: Path) -> None:
    one, two = kernels(2)
    before = write_log(tmp_path / "a", equal(2))
    after = write_log(tmp_path / "b", {one: 120.0}, seed=1)
    found = compared(before, after)
    (slow,) = Gates(regression=0.05).failures(found)
    assert slow.startswith(f"{one} on few_shot is ") and slow.endswith("expected 5% or less")
    assert Gates(regression=0.5).failures(found) == []
    assert Gates(missing=True).failures(found) == [f"{two} on few_shot has no time in B"]
    (mean,) = Gates(geomean=0.02).failures(found)
    assert mean.startswith("the geometric mean is ")
    assert (
        Gates(regression=0.01, geomean=0.01, missing=True).failures(compared(before, before)) == []
    )


def test_a_gate_wants_its_percents_and_a_time_in_b(tmp_path: Path) -> None:
    """3 % is no 5 %; a failure of A is no miss of B."""
    one = kernels(1)[0]
    before = write_log(tmp_path / "a", equal(1), latency_us=(100.0,) * ROUNDS, **STEADY)
    after = write_log(tmp_path / "b", equal(1), latency_us=(103.0,) * ROUNDS, **STEADY)
    (row,) = compared(before, after).rows
    assert row.sure and row.surely_slower_by == pytest.approx(0.03)
    assert Gates(regression=0.05).failures(compared(before, after)) == []
    (told,) = Gates(regression=0.025).failures(compared(before, after))
    assert told == f"{one} on few_shot is 3.0% slower; expected 2.5% or less"
    failed = TuningLog(tmp_path / "c" / DEVICE.slug / SPEC.slug)
    failed.append(trial_line(0, one, status="timeout"))
    assert Gates(missing=True).failures(compared(tmp_path / "c", after)) == []
    assert Gates(missing=True).failures(compared(after, tmp_path / "c"))


def test_the_gate_of_the_mean_believes_what_rows_are_believed_by(tmp_path: Path) -> None:
    """Neither single samples, nor the best of a search, nor what an hour or a place in memory
    explain; but all that is left."""
    gate = Gates(geomean=0.0)

    def failures(name: str, medians: dict[str, float], **fields: Any) -> list[str]:
        before = write_log(tmp_path / f"a{name}", equal(len(medians)), **fields)
        return gate.failures(
            compared(before, write_log(tmp_path / name, medians, seed=1, **fields))
        )

    assert failures("one sample", equal(3, 150.0), passes=()) == []
    searched = []
    for letter, median in (("c", 100.0), ("d", 150.0)):
        TuningLog(tmp_path / letter).append(
            trial_line(0, "k", latency_us=noisy(median, 1), passes=PASSES)
        )
        searched.append(tmp_path / letter)
    assert gate.failures(compared(*searched)) == []
    assert failures("hour", equal(10, 104.5)) == []
    (told,) = failures("more than an hour's", equal(10, 110.0))
    assert told.startswith("the geometric mean is ")
    mixed = equal(10) | dict.fromkeys(kernels(4), 130.0)
    assert failures("some", mixed)
    steady = {"latency_us": (100.0,) * ROUNDS, **STEADY}
    before = write_log(tmp_path / "steady", equal(1), **steady)
    for factor, fails in ((1.009, False), (1.02, True)):
        slower = steady | {"latency_us": (100.0 * factor,) * ROUNDS}
        after = write_log(tmp_path / str(factor), equal(1), **slower)
        assert bool(gate.failures(compared(before, after))) == fails

"""What `compare` says of two logs whose truth is known."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
import pytest
from comparable import DEVICE, SPEC, equal, kernels, noisy, run_line, trial_line, write_log

from deft_tvm.cli import main
from deft_tvm.compare.comparison import Comparison, Verdict, compare
from deft_tvm.compare.convergence import convergence
from deft_tvm.compare.gates import Gates
from deft_tvm.compare.sources import Source
from deft_tvm.compare.statistics import Samples, holm, mean_ratio, p_value, ratio
from deft_tvm.compare.text import markdown
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError, LogError
from deft_tvm.spec import AttentionSpec
from deft_tvm.timing import Summary
from deft_tvm.tuning.lines import Trial, decode
from deft_tvm.tuning.log import TRIALS, TuningLog, log_folders

SHIPPED = Path(__file__).parents[1] / "logs" / "amd-epyc-avx512bf16-2c"


def compared(before: Path, after: Path) -> Comparison:
    return compare(Source.read(before), Source.read(after))


def verdicts(found: Comparison) -> dict[str, Verdict | None]:
    return {row.subject.kernel: row.verdict for row in found.rows}


# Statistics


def test_a_ratio_lies_in_its_interval_and_the_interval_narrows_with_rounds() -> None:
    few = ratio(Samples.of(noisy(100, 1)), Samples.of(noisy(110, 2)))
    many = ratio(Samples.of(noisy(100, 1, rounds=600)), Samples.of(noisy(110, 2, rounds=600)))
    for found in (few, many):
        assert found.low <= found.median <= found.high
    assert many.low < 1.1 < many.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_rounds_of_a_slow_minute_are_not_taken_for_independent() -> None:
    """Three passes around 100, 110 and 120 µs, of many rounds each."""
    values = np.concatenate([noisy(median, 1, 0.002, 200) for median in (100, 110, 120)])
    by_pass, as_one = Samples.of(values, (200, 200, 200)), Samples.of(values)
    steady = Samples.of(np.full(18, 110.0), (6, 6, 6))
    wide, narrow = ratio(steady, by_pass), ratio(steady, as_one)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_passes_that_do_not_fit_the_rounds_are_not_believed() -> None:
    assert Samples.of([1.0, 2.0], (1,)).passes == (2,)


def test_too_few_rounds_have_no_p() -> None:
    assert p_value(Samples.of([1.0] * 5), Samples.of([2.0] * 18)) is None
    tested = p_value(Samples.of(noisy(100, 1)), Samples.of(noisy(120, 2)))
    assert tested is not None and tested < 1e-6


def test_holm_by_hand() -> None:
    """Of 0.01, 0.04, 0.03: 3 · 0.01, then 2 · 0.03, then the largest so far."""
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_mean_of_ratios_is_geometric() -> None:
    twice, half = Summary(2.0, 1.0, 4.0), Summary(0.5, 0.25, 1.0)
    found = mean_ratio([twice, half])
    assert found is not None and found.median == pytest.approx(1.0)
    assert found.high == pytest.approx(2 ** (1 / 2**0.5)) and found.low * found.high == 1.0
    assert mean_ratio([]) is None


# Verdicts


def test_faster_slower_and_the_same(tmp_path: Path) -> None:
    one, two, three = kernels(3)
    before = write_log(tmp_path / "a", equal(3))
    after = write_log(tmp_path / "b", {one: 100.0, two: 115.0, three: 80.0}, seed=1)
    found = compared(before, after)
    assert verdicts(found) == {one: Verdict.SAME, two: Verdict.SLOWER, three: Verdict.FASTER}
    assert found.mean is not None and found.mean.low < found.mean.median < found.mean.high


def test_a_change_below_the_smallest_is_none_however_sure(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1), latency_us=(100.0,) * 18, anchor_us=(50.0,) * 18)
    after = write_log(tmp_path / "b", equal(1), latency_us=(104.0,) * 18, anchor_us=(50.0,) * 18)
    (row,) = compared(before, after).rows
    assert row.sure and row.verdict is Verdict.SAME


def test_neighbours_that_slow_many_rounds_and_not_the_fastest_are_no_slow_kernel(
    tmp_path: Path,
) -> None:
    quick = noisy(100, 1)
    slow = tuple(us * (1.0 if number % 6 == 0 else 1.3) for number, us in enumerate(quick))
    before = write_log(tmp_path / "a", equal(1), latency_us=quick, anchor_us=(50.0,) * 18)
    after = write_log(tmp_path / "b", equal(1), latency_us=slow, anchor_us=(50.0,) * 18)
    (row,) = compared(before, after).rows
    assert row.ratio is not None and row.ratio.low > 1.1
    assert row.fastest is not None and row.fastest.median < 1.05
    assert row.verdict is Verdict.SAME


def test_the_best_of_a_search_is_not_tested(tmp_path: Path) -> None:
    before, after = tmp_path / "a", tmp_path / "b"
    for root, median in ((before, 100.0), (after, 200.0)):
        log = TuningLog(root)
        log.append(trial_line(0, "k", latency_us=noisy(median, 1)))
    (row,) = compared(before, after).rows
    assert row.p is None and row.verdict is Verdict.SAME
    assert "no last measurement" in markdown(compared(before, after))


def test_a_slow_hour_of_the_machine_is_no_slow_kernel(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(5))
    after = write_log(tmp_path / "b", equal(5), seed=1, slow_hour=1.5)
    assert set(verdicts(compared(before, after)).values()) == {Verdict.SAME}


def test_without_anchors_times_are_taken_as_they_are_and_that_is_said(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1), anchor_us=())
    after = write_log(tmp_path / "b", equal(1), seed=1, slow_hour=1.5, anchor_us=())
    found = compared(before, after)
    assert set(verdicts(found).values()) == {Verdict.SLOWER}
    assert "1 of 1 rows have no limit measured beside them" in markdown(found)


def test_what_is_in_one_log_only_and_what_failed(tmp_path: Path) -> None:
    one, two, three = kernels(3)
    before = write_log(tmp_path / "a", equal(2))
    after = write_log(tmp_path / "b", {one: 100.0, three: 100.0})
    log = TuningLog(after / DEVICE.slug / SPEC.slug)
    log.append(trial_line(9, two, status="timeout"))
    assert verdicts(compared(before, after)) == {
        one: Verdict.SAME,
        two: Verdict.FAILED,
        three: Verdict.ONLY_AFTER,
    }
    assert verdicts(compared(after, before))[three] is Verdict.ONLY_BEFORE


def test_two_devices_are_compared_by_shares_and_never_called_slower(tmp_path: Path) -> None:
    other = DeviceProfile.nominal(cores=64)
    before = write_log(tmp_path / "a", equal(2))
    after = write_log(tmp_path / "b", equal(2, 400.0), device=other.slug)
    found = compared(before, after)
    assert found.across_devices and set(verdicts(found).values()) == {None}
    gates = Gates(regression=0.01, geomean=0.01)
    assert gates.failures(found) == []
    assert "slower" not in markdown(found) and "faster" not in markdown(found)


def test_surroundings_that_differ_are_named_loudly(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1))
    after = write_log(tmp_path / "b", equal(1), versions={"tvm": "0.28.0", "torch": "2.13.0"})
    found = compared(before, after)
    assert found.differences == {"tvm": ("0.27.0", "0.28.0")}
    assert "**The surroundings differ**: tvm" in markdown(found)
    assert compared(before, before).differences == {}


def test_decisions_that_changed_are_named(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1), decision={"rows": 8, "dims": 4})
    after = write_log(tmp_path / "b", equal(1), decision={"rows": 16, "dims": 4, "new": 1})
    (row,) = compared(before, after).rows
    assert row.decisions == {"rows": (8, 16), "new": (None, 1)}
    assert "rows 8 → 16, new none → 1" in markdown(compared(before, after))


# How it converged


def test_convergence_counts_trials_and_minutes_of_its_own_runs(tmp_path: Path) -> None:
    log = TuningLog(tmp_path)
    log.append(run_line("one", time="2026-11-20T10:00:00+00:00"))
    log.append(trial_line(0, "k", latency_us=(200.0,), time="2026-11-20T10:01:00+00:00"))
    log.append(trial_line(1, "k", status="timeout", time="2026-11-20T10:03:00+00:00"))
    log.append(run_line("two", time="2026-11-21T10:00:00+00:00"))
    last = {"run": "two", "time": "2026-11-21T10:02:00+00:00"}
    log.append(trial_line(2, "k", latency_us=(100.0,), **last))
    log.append(trial_line(3, "k", latency_us=(90.0,) * 18, final=True, **last))
    (tuned,) = Source.read(tmp_path).tuned.values()
    found = convergence(tuned)
    assert found.best_us == (200.0, 200.0, 100.0)
    assert found.minutes == (1.0, 3.0, 5.0)
    assert (found.to_near, found.minutes_to_near) == (3, 5.0)
    assert found.failures == {"timeout": 1}


# Reading


def test_logs_of_several_devices_or_none_are_refused(tmp_path: Path) -> None:
    write_log(tmp_path, equal(1))
    write_log(tmp_path, equal(1), device="another")
    with pytest.raises(LogError, match=r"has logs of another, generic.*; expected one device's"):
        Source.read(tmp_path)
    with pytest.raises(LogError, match=r"is no folder; expected a tuning log"):
        Source.read(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LogError, match=r"has no trial in it; expected a tuning log"):
        Source.read(tmp_path / "empty")


def test_several_specs_and_damaged_lines(tmp_path: Path) -> None:
    write_log(tmp_path, equal(2))
    write_log(
        tmp_path, equal(1), spec=str(AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64))
    )
    file = next(tmp_path.glob("*/*/trials.jsonl"))
    file.write_bytes(file.read_bytes() + b"half a li")
    source = Source.read(tmp_path)
    assert len(source.tuned) == 3 and source.skipped == 1


# Gates


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


def test_a_gate_wants_both_ratios_beyond_it_and_a_time_in_b(tmp_path: Path) -> None:
    """8 % by the median and 3 % in the fastest rounds is no 5 %; a failure of A is no miss of B."""
    one = kernels(1)[0]
    medians = {"latency_us": (100.0, *(108.0,) * 5) * 3, "anchor_us": (50.0,) * 18}
    before = write_log(tmp_path / "a", equal(1), latency_us=(100.0,) * 18, anchor_us=(50.0,) * 18)
    slower = (103.0, *(108.0,) * 5) * 3
    after = write_log(tmp_path / "b", equal(1), **medians | {"latency_us": slower})
    (row,) = compared(before, after).rows
    assert row.sure and row.surely_slower_by == pytest.approx(0.03)
    assert Gates(regression=0.05).failures(compared(before, after)) == []
    (told,) = Gates(regression=0.025).failures(compared(before, after))
    assert told == f"{one} on few_shot is 3.0% slower; expected 2.5% or less"
    failed = TuningLog(tmp_path / "c" / DEVICE.slug / SPEC.slug)
    failed.append(trial_line(0, one, status="timeout"))
    assert Gates(missing=True).failures(compared(tmp_path / "c", after)) == []
    assert Gates(missing=True).failures(compared(after, tmp_path / "c"))


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, arguments)])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out + told.err


def test_a_planted_kernel_10_percent_slower_is_found_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = kernels(10)[3]
    before = write_log(tmp_path / "a", equal(10))
    after = write_log(tmp_path / "b", equal(10) | {planted: 110.0}, seed=1)
    code, text = run(capsys, before, after, "--fail-on-regression", "5%")
    assert code == 1
    assert f"FAILED: {planted} on few_shot is " in text and text.count("FAILED") == 1
    code, text = run(capsys, before, before, "--fail-on-regression", "5%", "--fail-on", "missing")
    assert code == 0 and "0 slower, 0 faster, 10 not surely changed" in text


def test_each_row_has_the_command_that_reproduces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_log(tmp_path / "a", equal(2))
    _, text = run(capsys, before, before)
    for kernel in kernels(2):
        assert f"--kernel {kernel} --workload few_shot" in text


def test_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_log(tmp_path / "a", equal(2))
    after = write_log(tmp_path / "b", equal(1), seed=1)
    code, text = run(capsys, before, after, after, "--json")
    found = json.loads(text)
    assert code == 0 and len(found["comparisons"]) == 2 and found["failures"] == []
    one, two = found["comparisons"][0]["rows"]
    assert one["verdict"] == "~" and two["verdict"] == "only in A" and two["after"] is None
    assert len(one["before"]["latency_us"]) == 18 and 0.4 < one["before"]["limit_share"] < 0.6


def test_wrong_use_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_log(tmp_path / "a", equal(1))
    for arguments in ((one,), (one, tmp_path / "absent"), (one, one, "--fail-on", "x")):
        code, text = run(capsys, *arguments)
        assert code == 2 and "expected" in text


# Trust


def test_a_log_beside_itself_measured_again_raises_few_false_alarms(tmp_path: Path) -> None:
    """100 comparisons of ten rows that were measured four times, minutes apart, with nothing
    changed: each side gets three passes of those twelve, and draws its rounds from them."""
    lines = (SHIPPED / "benchmarks" / "again.jsonl").read_bytes().splitlines()
    measured = [line for line in map(decode, lines) if isinstance(line, Trial)]
    for folder in log_folders(SHIPPED):
        measured += [t.best for t in Source.read(folder).tuned.values() if t.best is not None]
    by_row: defaultdict[tuple[str, ...], list[Trial]] = defaultdict(list)
    for trial in measured:
        if trial.status == "ok" and trial.final and trial.anchor_us:
            by_row[(trial.spec, *trial.subject)].append(trial)
    rows = [row for row in by_row.values() if len(row) == 4][:10]
    assert len(rows) == 10
    rng = np.random.default_rng(0)
    alarms = [alarmed([_divided(row) for row in rows], tmp_path, rng) for _ in range(100)]
    assert sum(alarms) <= 5


Rounds = tuple[np.ndarray, np.ndarray]
"""Times of a pass, and of its anchors."""


def alarmed(rows: list[list[Rounds]], folder: Path, rng: np.random.Generator) -> bool:
    """Whether a comparison of two redrawn logs calls any row faster or slower."""
    chosen = [rng.permutation(len(row)) for row in rows]
    sides = []
    for side in range(2):
        lines = []
        for place, (row, order) in enumerate(zip(rows, chosen, strict=True)):
            passes = [row[number] for number in order[3 * side : 3 * side + 3]]
            drawn = [rng.integers(len(times), size=len(times)) for times, _ in passes]
            redrawn = [
                [each[pick] for each, pick in zip(kind, drawn, strict=True)]
                for kind in zip(*passes, strict=True)
            ]
            times, anchors = (tuple(np.concatenate(kind).tolist()) for kind in redrawn)
            lengths = tuple(len(pick) for pick in drawn)
            lines.append(
                trial_line(
                    *(place, f"row{place}"),
                    **{"latency_us": times, "anchor_us": anchors, "passes": lengths},
                    final=True,
                )
            )
        path = folder / str(side) / TRIALS
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
        sides.append(Source.read(path.parent))
    return bool(compare(*sides).having(Verdict.SLOWER, Verdict.FASTER))


def _divided(trials: list[Trial]) -> list[Rounds]:
    """All passes of some measurements."""
    passes = []
    for trial in trials:
        ends = np.cumsum(trial.passes)[:-1]
        times, anchors = (
            np.split(np.asarray(a), ends) for a in (trial.latency_us, trial.anchor_us)
        )
        passes += list(zip(times, anchors, strict=True))
    return passes

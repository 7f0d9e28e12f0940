"""What `compare` says of two logs whose truth is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparable import DEVICE, ROUNDS, SPEC, equal, kernels, noisy, run_line, trial_line, write_log

from deft_tvm.cli import main
from deft_tvm.compare.comparison import Comparison, Verdict, compare
from deft_tvm.compare.convergence import convergence
from deft_tvm.compare.gates import Gates
from deft_tvm.compare.sources import Source
from deft_tvm.compare.statistics import (
    ALIKE,
    LIMIT,
    Samples,
    change,
    common_unit,
    holm,
    mean_ratio,
    shared,
)
from deft_tvm.compare.text import markdown
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.limit import PRODUCT
from deft_tvm.spec import AttentionSpec
from deft_tvm.timing import Summary
from deft_tvm.tuning.log import TuningLog


def compared(before: Path, after: Path) -> Comparison:
    return compare(Source.read(before), Source.read(after))


def verdicts(found: Comparison) -> dict[str, Verdict | None]:
    return {row.subject.kernel: row.verdict for row in found.rows}


# Statistics


def samples(values: Any, beside: dict[str, Any] | None = None) -> Samples:
    """Each round a pass of its own."""
    return Samples.of(values, (1,) * len(values), beside)


def test_a_ratio_lies_in_its_interval_and_the_interval_narrows_with_passes() -> None:
    few = change(samples(noisy(100, 1, rounds=18)), samples(noisy(110, 2, rounds=18))).ratio
    many = change(samples(noisy(100, 1, rounds=600)), samples(noisy(110, 2, rounds=600))).ratio
    for found in (few, many):
        assert found.low <= found.median <= found.high
    assert many.low < 1.1 < many.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_the_interval_is_students_by_hand() -> None:
    """Means 0 and 0.02 of logarithms, squares 2 · 0.0002 with 4 degrees of freedom: t is 2.776."""
    before, after = (np.exp(np.array([-0.01, 0.0, 0.01]) + x) for x in (0.0, 0.02))
    found = change(samples(before), samples(after)).ratio
    half = 2.776 * (0.0004 / 4 * 2 / 3) ** 0.5
    assert np.log([found.low, found.median, found.high]) == pytest.approx(
        [0.02 - half, 0.02, 0.02 + half], abs=1e-5
    )
    alone = change(samples([2.0]), samples([3.0]))
    assert alone.ratio == Summary(*[pytest.approx(1.5)] * 3) and alone.p is None


def test_rounds_of_a_slow_minute_are_not_taken_for_independent() -> None:
    """Three passes around 100, 110 and 120 µs, of many rounds each."""
    values = np.concatenate([noisy(median, 1, 0.002, 200) for median in (100, 110, 120)])
    by_pass, as_one = Samples.of(values, (200, 200, 200)), samples(values)
    wide, narrow = change(by_pass, by_pass).ratio, change(as_one, as_one).ratio
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_passes_of_more_rounds_are_not_faster_for_that() -> None:
    """The fastest of many rounds is faster than that of a few."""
    few, many = (Samples.of(noisy(100, n, 0.1, 12 * n), (n,) * 12) for n in (6, 60))
    assert many.fastest(60).mean() < few.fastest(6).mean() - 0.05
    assert 0.98 < change(few, many).ratio.median < 1.03


def test_passes_and_probes_that_do_not_fit_the_rounds_are_not_believed() -> None:
    found = Samples.of([1.0, 2.0], (1,), {"read": [1.0], "product": [1.0, 2.0]})
    assert found.passes == (2,) and set(found.beside) == {"product"}
    assert Samples.of([1.0, 2.0, 3.0]).passes == (3,)


@pytest.mark.parametrize(("one", "other", "tested"), [(5, 5, False), (5, 6, True), (3, 12, True)])
def test_too_few_passes_have_no_p(one: int, other: int, tested: bool) -> None:
    found = change(samples(noisy(100, 1, rounds=one)), samples(noisy(150, 2, rounds=other))).p
    assert (found is not None) == tested
    assert found is None or found < 0.01


def test_one_percent_is_no_change_however_sure() -> None:
    """Another place of the code does as much, however often both were timed."""
    before = samples(noisy(100, 1, 0.001))
    assert change(before, samples(noisy(100.5, 2, 0.001))).p == 1.0
    tested = change(before, samples(noisy(102, 2, 0.001))).p
    assert tested is not None and tested < 1e-6


def hour(
    us: float,
    read: float,
    seed: int,
    follows: float,
    clock: float = 1.0,
    passes: int = 12,
    moves: float = 0.2,
) -> Samples:
    """A kernel whose time grows with the power `follows` of that of reading, which `moves` from
    pass to pass around `read`."""
    rng = np.random.default_rng(seed)
    clocks = clock * np.exp(rng.normal(0, 0.005, passes))
    reading = read * np.exp(rng.normal(0, moves, passes))
    own = us * clocks * reading**follows * np.exp(rng.normal(0, 0.01, passes))
    product = clocks * np.exp(rng.normal(0, 0.01, passes))
    return samples(own, {"read": clocks * reading, "product": product})


@pytest.mark.parametrize("follows", [0.0, 0.3, 1.0])
def test_what_the_bandwidth_of_an_hour_explains_is_no_change(follows: float) -> None:
    for seed in range(20):
        before = hour(100, 1.0, 2 * seed, follows)
        after = hour(100, 1.3, 2 * seed + 1, follows, clock=1.2)
        slower = hour(110, 1.3, 2 * seed + 1, follows, clock=1.2)
        same, found = change(before, after), change(before, slower)
        assert same.p is not None and same.p > 0.01 and 0.96 < same.ratio.median < 1.04
        assert found.p is not None and found.p < 0.005 and found.ratio.low > 1.04


@pytest.mark.parametrize("follows", [0.0, 1.0])
def test_what_was_learned_from_little_is_not_believed_far_from_it(follows: float) -> None:
    """Reading moved by 3 % in each hour, and takes 40 % longer in the other one."""
    alarms = 0
    for seed in range(200):
        before = hour(100, 1.0, 2 * seed, follows, moves=0.03)
        after = hour(100, 1.4, 2 * seed + 1, follows, moves=0.03)
        p = change(before, after).p
        assert p is not None
        alarms += p < 0.05
    assert alarms <= 10


def test_nothing_is_learned_from_few_passes_or_a_bandwidth_that_never_moves() -> None:
    still = [hour(100, read, seed, 0.0, moves=0.0) for read, seed in ((1.0, 1), (1.3, 2))]
    for x in still:  # to the last bit
        x.beside["read"][:] = x.beside["read"][0]
    few = [hour(100, read, seed, 1.0, passes=9) for read, seed in ((1.0, 1), (1.3, 2))]
    for before, after in (still, few):
        plain = [np.log(x.values / x.beside["product"]).mean() for x in (before, after)]
        assert change(before, after).ratio.median == pytest.approx(np.exp(plain[1] - plain[0]))


def test_holm_by_hand() -> None:
    """Of 0.01, 0.04, 0.03: 3 · 0.01, then 2 · 0.03, then the largest so far."""
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_most_rows_share_by_hand() -> None:
    """The median, beyond one percent; of few rows and of more than so much nothing."""
    ratios = [Summary(r, r, r) for r in (0.97, 1.04, 1.05, 1.06, 1.3)]
    assert shared(ratios, 1.06) == pytest.approx(np.log(1.05 / 1.01))
    assert shared([Summary(1 / r.median, 0, 0) for r in ratios], 1.06) == pytest.approx(
        -np.log(1.05 / 1.01)
    )
    assert shared(ratios[1:], 1.06) == shared(ratios, 1.04) == 0.0
    assert shared([Summary(1.009, 1, 1)] * 9, 1.05) == 0.0


def test_what_rows_share_by_more_than_is_excused_is_news_either_way() -> None:
    for ratio in (1.2, 1 / 1.2):
        rows = [Summary(ratio, ratio, ratio)] * 5
        assert shared(rows, 1.1) == 0.0
        left = math.copysign(math.log(1.2) - math.log1p(ALIKE), ratio - 1)
        assert shared(rows, 1.3) == pytest.approx(left, rel=1e-12)


def test_passes_that_do_not_fit_are_one_and_products_come_before_old_limits() -> None:
    for passes in ((2, 0), (1, 2), ()):
        assert Samples.of([1.0, 2.0], passes).passes == (2,)
    both = Samples.of([1.0], beside={LIMIT: [1.0], PRODUCT: [1.0]})
    old = Samples.of([1.0], beside={LIMIT: [1.0]})
    assert common_unit(both, both) == PRODUCT and common_unit(both, old) == LIMIT
    assert common_unit(old, Samples.of([1.0], beside={PRODUCT: [1.0]})) is None


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


STEADY = {
    "anchor_us": (50.0,) * ROUNDS,
    "probe_us": {"read": (4000.0,) * ROUNDS, "product": (5000.0,) * ROUNDS},
}


def test_a_change_below_the_smallest_is_none_however_sure(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1), latency_us=(100.0,) * ROUNDS, **STEADY)
    after = write_log(tmp_path / "b", equal(1), latency_us=(104.0,) * ROUNDS, **STEADY)
    (row,) = compared(before, after).rows
    assert row.sure and row.verdict is Verdict.SAME


def test_neighbours_that_slow_many_rounds_and_not_the_fastest_are_no_slow_kernel(
    tmp_path: Path,
) -> None:
    quick = noisy(100, 1)
    slow = tuple(us * (1.0 if number % 6 == 0 else 1.3) for number, us in enumerate(quick))
    before = write_log(tmp_path / "a", equal(1), latency_us=quick, **STEADY)
    after = write_log(tmp_path / "b", equal(1), latency_us=slow, **STEADY)
    (row,) = compared(before, after).rows
    assert row.before is not None and row.after is not None
    assert row.after.samples.median > 1.2 * row.before.samples.median
    assert row.ratio is not None and row.ratio.median < 1.06
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


def test_an_hour_that_slows_all_rows_a_little_is_no_slow_kernel(tmp_path: Path) -> None:
    """4.5 % of all, beyond what is measured beside, and 6.5 % of one: that is no change of it. The
    same is one among few, as it is where all are slower by more than an hour explains."""
    last = kernels(10)[-1]

    def found(many: int, each: float, of_last: float) -> Comparison:
        before = write_log(tmp_path / f"a{many}{each}{of_last}", equal(many))
        medians = {**equal(many, 100 * each), kernels(many)[-1]: 100 * of_last}
        return compared(before, write_log(tmp_path / f"b{many}{each}{of_last}", medians, seed=1))

    hour = found(10, 1.045, 1.065)
    assert set(verdicts(hour).values()) == {Verdict.SAME}
    assert "1.02" in markdown(hour) and "taken for the hour's" in markdown(hour)
    assert verdicts(found(10, 1.045, 1.15))[last] is Verdict.SLOWER
    assert verdicts(found(4, 1.045, 1.065))[kernels(4)[-1]] is Verdict.SLOWER
    assert set(verdicts(found(10, 1.1, 1.1)).values()) == {Verdict.SLOWER}


def test_logs_that_know_the_limit_alone_are_compared_in_its_parts(tmp_path: Path) -> None:
    """As older versions wrote them."""
    before = write_log(tmp_path / "a", equal(5), probe_us={})
    after = write_log(tmp_path / "b", equal(5), seed=1, slow_hour=1.5)
    found = compared(before, after)
    assert set(verdicts(found).values()) == {Verdict.SAME}
    assert all(row.anchored for row in found.rows) and "measured beside them" not in markdown(found)


def test_another_torch_has_another_product_and_times_are_plain(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1))
    other = {"tvm": "0.27.0", "torch": "2.14.0"}
    quicker = {"product": noisy(4000.0, 1, 0.01), "read": noisy(4000.0, 2, 0.1)}
    after = write_log(tmp_path / "b", equal(1), seed=1, versions=other, probe_us=quicker)
    found = compared(before, after)
    assert set(verdicts(found).values()) == {Verdict.SAME} and not found.rows[0].anchored
    assert "rows have nothing measured beside them" in markdown(found)


def test_without_anchors_times_are_taken_as_they_are_and_that_is_said(tmp_path: Path) -> None:
    before = write_log(tmp_path / "a", equal(1), anchor_us=(), probe_us={})
    after = write_log(tmp_path / "b", equal(1), seed=1, slow_hour=1.5, anchor_us=(), probe_us={})
    found = compared(before, after)
    assert set(verdicts(found).values()) == {Verdict.SLOWER}
    assert "1 of 1 rows have nothing measured beside them" in markdown(found)


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
    log.append(trial_line(3, "k", latency_us=(90.0,) * ROUNDS, final=True, **last))
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
    assert len(one["before"]["latency_us"]) == ROUNDS and 0.4 < one["before"]["limit_share"] < 0.6


def test_wrong_use_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_log(tmp_path / "a", equal(1))
    for arguments in ((one,), (one, tmp_path / "absent"), (one, one, "--fail-on", "x")):
        code, text = run(capsys, *arguments)
        assert code == 2 and "expected" in text

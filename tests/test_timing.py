"""The measuring loop, on a clock that the test turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import pytest

from deft_tvm.timing import FEWEST_ROUNDS, Summary, Timing, measure


class Clock:
    """Stands still but for `spend`; remembers who spent."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_calls_take_turns_and_the_warm_up_is_not_counted(clock: Clock) -> None:
    calls = {name: lambda name=name: clock.spend(name, 1.0) for name in "ab"}
    timings = measure(calls, budget=0, warmup=3, clock=clock)
    assert clock.calls == ["a", "b"] * (3 + FEWEST_ROUNDS)
    assert list(timings) == ["a", "b"]
    assert timings["a"].seconds == (1.0,) * FEWEST_ROUNDS


def test_it_stops_when_the_budget_is_spent(clock: Clock) -> None:
    timings = measure({"a": lambda: clock.spend("a", 0.5)}, budget=10, warmup=0, clock=clock)
    assert len(timings["a"].seconds) == 20


def test_it_stops_after_most_rounds(clock: Clock) -> None:
    timings = measure({"a": lambda: None}, budget=10, most_rounds=3, clock=clock)
    assert timings["a"].seconds == (0.0,) * 3


def test_cold_measuring_walks_its_buffer_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []
    monkeypatch.setattr("deft_tvm.timing.walk", lambda size: lambda: walked.append(size))
    measure({"a": lambda: None, "b": lambda: None}, budget=0, cold_bytes=4096)
    assert walked == [4096] * 2 * FEWEST_ROUNDS


def test_a_walk_is_not_timed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_tvm.timing.walk", lambda size: lambda: clock.spend("walk", 5.0))
    call = {"a": lambda: clock.spend("a", 1.0)}
    assert set(measure(call, budget=0, cold_bytes=4096, clock=clock)["a"].seconds) == {1.0}


def test_a_stopwatch_tells_the_time_and_cools_by_itself(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deft_tvm.timing.walk", lambda size: lambda: clock.spend("walk", 5.0))
    watched: list[object] = []

    def stopwatch(call: Callable[[], object]) -> float:
        watched.append(call)
        return 0.123456789

    call = {"a": lambda: clock.spend("a", 1.0)}
    timings = measure(call, budget=0, warmup=1, cold_bytes=4096, clock=clock, stopwatch=stopwatch)
    assert watched == [call["a"]] * FEWEST_ROUNDS and clock.calls == ["a"]
    assert set(timings["a"].seconds) == {0.12345679}, "to ten nanoseconds"


def test_a_cold_walk_touches_all_of_a_buffer_of_that_size() -> None:
    from deft_tvm.timing import walk

    assert walk(4096)() == 4096 / 4, "the sum of as many ones"


def test_the_garbage_collector_rests_meanwhile_and_comes_back_after_an_error() -> None:
    seen: list[bool] = []
    measure({"a": lambda: seen.append(gc.isenabled())}, budget=0)
    assert seen and not any(seen) and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 / 0}, budget=0)
    assert gc.isenabled()
    gc.disable()
    try:
        measure({"a": lambda: None}, budget=0)
        assert not gc.isenabled(), "who had it off has it off"
    finally:
        gc.enable()


def test_the_interval_of_the_median_is_two_order_statistics() -> None:
    # The 40th and the 61st: the chance that fewer than 40 of 100 fall below the median is 1.8 %.
    assert Summary.of(tuple(float(i) for i in range(100, 0, -1))) == Summary(50.5, 40.0, 61.0)
    assert Summary.of((3.0, 1.0, 2.0)) == Summary(2.0, 1.0, 3.0)
    assert Summary.of((5.0,)) == Summary(5.0, 5.0, 5.0)


def test_a_speedup_compares_round_by_round() -> None:
    slow, fast = Timing((4.0, 40.0, 6.0)), Timing((2.0, 10.0, 2.0))
    assert fast.speedup(slow) == Summary(3.0, 2.0, 4.0)
    assert fast.median == statistics.median(fast.seconds) == fast.summary.median

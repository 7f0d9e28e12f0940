"""Whole tunings: what they try and leave in the log, and machines that go away meanwhile."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence

import filelock
import msgspec
import pytest
import tuning_run
from test_tuning import DEVICE, SUBJECTS, decline_half, space
from tuning_run import SPEC, FakeRunner
from tvm import IRModule
from tvm.s_tir import meta_schedule as ms

from deft_tvm.build import logged_decisions
from deft_tvm.errors import LogError, TuningError
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.again import measure_again
from deft_tvm.tuning.budget import Budget
from deft_tvm.tuning.database import FILES, Database
from deft_tvm.tuning.lines import SCHEMA, Trial
from deft_tvm.tuning.log import TuningLog, best, by_subject, chosen, winner
from deft_tvm.tuning.logged import logged_device, logged_kernels
from deft_tvm.tuning.messages import Outcome
from deft_tvm.tuning.passes import ALONE, IN_TURN
from deft_tvm.tuning.probe import write_profile
from deft_tvm.tuning.replay import replay
from deft_tvm.tuning.result import Progress
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.strategy import HABITS
from deft_tvm.tuning.subject import Subject
from deft_tvm.tuning.tune import tune

PASSES = ALONE.passes["cpu"]


@pytest.fixture(scope="module")
def largest() -> Space:
    """The space with the most decisions."""
    return max(map(space, SUBJECTS), key=len)


def decisions(log: TuningLog) -> Counter:
    """How often each decision was tried in the search."""
    searched = (trial for trial in log.read() if not trial.final)
    return Counter((*trial.subject, *sorted(trial.decision.items())) for trial in searched)


def test_a_tuning_and_one_more(tmp_path) -> None:
    result = tuning_run.run(str(tmp_path), 9)
    log = TuningLog(result.log.directory)
    assert result.new_trials == sum(decisions(log).values()) == 9
    assert set(decisions(log).values()) == {1}
    assert {name: kernel.decision for name, kernel in result.kernels.items()} == {
        name: trial.decision for name, trial in best(log).items()
    }
    for kernel in result.kernels.values():
        assert kernel.default_us is not None and kernel.best_us <= kernel.default_us
    assert len(Database(log.directory)) == 9

    runner = FakeRunner()
    again = tuning_run.run(str(tmp_path), 9, runner=runner)
    assert again.new_trials == 0 and runner.timed == []
    more = tuning_run.run(str(tmp_path), 12)
    assert more.new_trials == 3 and set(decisions(log).values()) == {1}


def test_a_gain_is_told_of_one_measurement_alone(tmp_path) -> None:
    """Trials of the search have a time each of another moment, in which all may be slower."""

    class Slowing(FakeRunner):
        def told(self, outcomes: list[Outcome], last: bool) -> list[Outcome]:
            factor = 1.0 if last else 1.0 + len(self.timed)
            return [
                msgspec.structs.replace(
                    each, latency_us=tuple(factor * us for us in each.latency_us)
                )
                for each in outcomes
            ]

    events: list[Progress] = []
    result = tuning_run.run(str(tmp_path), 9, runner=Slowing(), listener=events.append)
    gains = {name: kernel.default_us / kernel.best_us for name, kernel in result.kernels.items()}
    assert {event.gain for event in events if event.phase == "search"} == {None}
    told = [event for event in events if event.phase == "final"]
    known = {event.kernel: event.gain for event in told if event.gain is not None}
    assert known and known == {name: gains[name] for name in known}
    tuning_run.run(str(tmp_path), 12, runner=Slowing(), listener=events.append)
    again = [event for event in events[-100:] if event.phase == "search" and event.gain is not None]
    assert {event.gain for event in again} <= {*gains.values()}


def test_failed_trials_are_kept_and_not_repeated(tmp_path, largest) -> None:
    start = ms.utils.shash2hex(largest.candidate(largest.start).sch.mod)
    result = tuning_run.run(str(tmp_path), 6, runner=FakeRunner(broken=[start]))
    failed = [trial for trial in result.log.read() if trial.status == "runtime"]
    assert [trial.error for trial in failed] == ["broken"]
    assert result.kernels[largest.subject.kernel].default_us is None
    tuning_run.run(str(tmp_path), 9)
    assert set(decisions(result.log).values()) == {1}


def test_declined_decisions_are_kept_and_not_repeated(tmp_path, largest, monkeypatch) -> None:
    decline_half(monkeypatch, largest)
    result = tuning_run.run(str(tmp_path), 9)
    statuses = Counter(trial.status for trial in result.log.read() if not trial.final)
    assert statuses["refused"] > 0 and statuses["ok"] == result.new_trials
    assert len(Database(result.log.directory)) == statuses["ok"]
    tuning_run.run(str(tmp_path), sum(statuses.values()) + 2)
    assert set(decisions(result.log).values()) == {1}


def test_two_tunings_of_one_log_are_refused(tmp_path) -> None:
    directory = tmp_path / DEVICE.slug / SPEC.slug
    directory.mkdir(parents=True)
    with (
        filelock.FileLock(directory / ".lock"),
        pytest.raises(TuningError, match=r"another tuning writes .*; wait for it, or name another"),
    ):
        tuning_run.run(str(tmp_path), 2)


def test_the_database_is_mended_from_the_log(tmp_path) -> None:
    directory = tuning_run.run(str(tmp_path), 4).log.directory
    workloads, records = (directory / name for name in FILES)
    records.write_bytes(records.read_bytes()[:-30])
    tuning_run.run(str(tmp_path), 5)
    assert len(Database(directory)) == 5
    workloads.write_text("nonsense\n")
    tuning_run.run(str(tmp_path), 6)
    assert len(Database(directory)) == 6
    assert workloads.with_suffix(".unreadable.json").exists()
    workloads.unlink()
    tuning_run.run(str(tmp_path), 7)
    assert len(Database(directory)) == 7
    assert len(ms.database.JSONDatabase(str(workloads), str(records))) == 7, "as TVM reads it"


# What the log says of a run


def test_a_run_says_what_it_ran_on_and_with(tmp_path) -> None:
    result = tuning_run.run(str(tmp_path), 6, seed=3)
    reading = result.log.read()
    (run,) = reading.runs.values()
    assert {trial.run for trial in reading} == {run.run}
    assert (run.seed, run.trials, run.minutes, run.runner) == (3, 6, None, "fake")
    assert (run.spec, run.device, run.features) == (str(SPEC), DEVICE.slug, DEVICE.features)
    assert run.policy.passes == PASSES and run.policy.final_rounds >= 10
    assert run.schema == SCHEMA and {"tvm", "torch"} <= run.versions.keys()
    tuning_run.run(str(tmp_path), 6, seed=3)
    assert len(result.log.read().runs) == 1, "nothing to do, nothing to say"


def test_the_last_measurement_has_passes_and_every_trial_its_limit(tmp_path) -> None:
    final = [t for t in tuning_run.run(str(tmp_path), 6).log.read() if t.final]
    assert len(final) >= 2
    for trial in final:
        assert len(trial.passes) == (PASSES if trial.alone else IN_TURN.passes["cpu"])
        assert sum(trial.passes) == len(trial.latency_us) >= 10
        assert trial.limit_us is not None and trial.limit_us > 0


def test_a_last_measurement_of_fewer_passes_is_made_again(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as older:
        older.setitem(ALONE.passes, "cpu", 5)
        tuning_run.run(str(tmp_path), 6)
    log = tuning_run.run(str(tmp_path), 6).log
    alone = [len(trial.passes) for trial in log.read() if trial.alone]
    assert alone == [5] * (len(alone) // 2) + [PASSES] * (len(alone) // 2)
    assert tuning_run.run(str(tmp_path), 6).new_trials == 0
    assert len(log.read()) == len(tuning_run.run(str(tmp_path), 6).log.read())


def test_the_winner_is_measured_alone_after_it_was_chosen(tmp_path) -> None:
    """What chose it flatters it, so that the log's word on it is another measurement."""
    log = tuning_run.run(str(tmp_path), 12).log
    for trials in by_subject(log.read()).values():
        final = [trial for trial in trials if trial.final]
        (alone,) = (trial for trial in final if trial.alone)
        assert alone is final[-1] is winner(trials)
        assert alone.decision == chosen(trials).decision
        assert chosen(trials) is not alone or len(final) == 1


def test_the_best_of_several_attentions_are_measured_in_the_same_passes(tmp_path) -> None:
    events: list[Progress] = []
    shape = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "page_size": 4}
    other = AttentionSpec.gqa(**shape, dtype="bfloat16")
    given = {"device": DEVICE, "root": str(tmp_path), "apart": 0.0, "runner": FakeRunner()}
    found = tune([SPEC, other], [tuning_run.WORKLOAD], trials=4, listener=events.append, **given)
    assert [result.new_trials for result in found] == [4, 4]
    assert [result.log.directory.name for result in found] == [SPEC.slug, other.slug]
    last = [event for event in events if "winner again" in event.text]
    kernels = sum(len(result.kernels) for result in found)
    assert len(last) == PASSES * kernels
    for number in range(PASSES):
        one = last[number * kernels : (number + 1) * kernels]
        assert {event.spec for event in one} == {str(SPEC), str(other)}
        assert all(event.text.endswith(f"pass {number + 1} of {PASSES}") for event in one)
    write_profile(DEVICE, tmp_path)
    again = measure_again(
        *(result.log for result in found), into=tmp_path / "again", apart=0, runner=FakeRunner()
    )
    for result, measured in zip(found, again, strict=True):
        assert {t.kernel for t in measured.read()} == result.kernels.keys()


def test_a_pass_that_loses_its_machine_costs_that_pass_alone(tmp_path) -> None:
    class Losing(FakeRunner):
        """Loses every fifth pass of the last measurement, and another try at it."""

        made = 0

        def told(self, outcomes: list[Outcome], last: bool) -> list[Outcome]:
            self.made += last
            lost = last and self.made % 6 in (4, 5)
            return [Outcome("lost", error="gone")] * len(outcomes) if lost else outcomes

    final = [t for t in tuning_run.run(str(tmp_path), 6, runner=Losing()).log.read() if t.final]
    assert all(trial.status == "ok" for trial in final)
    assert any(len(trial.passes) < PASSES for trial in final if trial.alone)


@pytest.mark.parametrize(
    ("noise", "passes"),
    [
        (0.0, [PASSES]),
        (0.2, range(PASSES + 1, ALONE.most["cpu"])),
        (0.8, [ALONE.most["cpu"]]),
    ],
)
def test_a_winner_is_measured_until_its_time_is_known(tmp_path, noise, passes) -> None:
    class Noisy(FakeRunner):
        """Every pass of the last measurement is as much slower as chance has it."""

        chance = random.Random(5)

        def told(self, outcomes: list[Outcome], last: bool) -> list[Outcome]:
            slower = 1 + noise * self.chance.random() if last else 1.0
            return [
                msgspec.structs.replace(
                    each, latency_us=tuple(slower * us for us in each.latency_us)
                )
                for each in outcomes
            ]

    log = tuning_run.run(str(tmp_path), 6, runner=Noisy()).log
    counts = [len(trial.passes) for trial in log.read() if trial.alone]
    assert counts and all(count in passes for count in counts)
    in_turn = [len(trial.passes) for trial in log.read() if trial.final and not trial.alone]
    assert set(in_turn) == {IN_TURN.passes["cpu"]}


def test_real_finals_are_anchored(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ALONE.passes, "cpu", 2)
    monkeypatch.setitem(ALONE.most, "cpu", 2)
    monkeypatch.setitem(IN_TURN.passes, "cpu", 1)
    result = tuning_run.run(str(tmp_path), 3, real=True)
    finals = [t for t in result.log.read() if t.final]
    assert finals
    for trial in finals:
        assert len(trial.anchor_us) == len(trial.latency_us) and min(trial.anchor_us) > 0
        assert set(trial.probe_us) == {"read", "product"}
        assert all(len(us) == len(trial.latency_us) for us in trial.probe_us.values())
    write_profile(result.device, tmp_path)
    (again,) = measure_again(result.log, into=tmp_path / "again", apart=0.1)
    measured = list(again.read())
    assert all(t.final and t.anchor_us and t.status == "ok" for t in measured)
    assert {t.kernel: t.decision for t in measured} == {
        name: trial.decision for name, trial in best(result.log).items()
    }


# The budget


def test_minutes_end_the_search() -> None:
    now = [0.0]
    budget = Budget(minutes=1, clock=lambda: now[0])
    assert not budget.late and budget.goal(5) > 5
    now[0] = 59.0
    assert not budget.late
    now[0] = 60.0
    assert budget.late
    assert Budget(trials=7).goal(3) == 7 and not Budget(trials=7).late


def test_a_tuning_by_time_stops_and_is_settled(tmp_path) -> None:
    result = tuning_run.run(str(tmp_path), None, minutes=0.03)
    trials = list(result.log.read())
    assert 0 < result.new_trials < sum(len(space(kernel)) for kernel in SUBJECTS)
    assert trials[-1].final


def test_time_left_is_told_once_it_can_be() -> None:
    now = [0.0]
    budget = Budget(trials=10, minutes=2, clock=lambda: now[0])
    now[0] = 30.0
    assert budget.seconds_left(made=0, new=0) == 90
    assert budget.seconds_left(made=6, new=3) == 40
    assert Budget().seconds_left(made=6, new=3) is None


def test_progress_tells_failures_limit_and_best(tmp_path, largest) -> None:
    events: list[Progress] = []
    start = ms.utils.shash2hex(largest.candidate(largest.start).sch.mod)
    tuning_run.run(str(tmp_path), 6, runner=FakeRunner(broken=[start]), listener=events.append)
    assert [event.phase for event in events][:1] == ["start"] and events[-1].phase == "done"
    last = [event for event in events if event.phase == "search"][-1]
    assert last.failures == {"runtime": 1} and last.trial == last.trials == 6
    assert last.best_us and last.limit_us and last.seconds_left == 0
    assert any(f"pass {PASSES} of {PASSES}" in event.text for event in events)


# Many machines


class Fleet(FakeRunner):
    """Several machines at once, some of which go away with what they were given.

    Attributes:
        most: calls that went on at the same time.
    """

    def __init__(self, width: int, losing: Sequence[str] = (), times: int = 1) -> None:
        super().__init__()
        self.name, self.width = "rpc", width
        self.left = dict.fromkeys(losing, times)
        self.running = self.most = 0
        self._lock = threading.Lock()

    def time(
        self,
        modules: Sequence[IRModule],
        subject: Subject,
        seconds: float,
        rounds: int | None = None,
    ) -> list[Outcome]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            key = ms.utils.shash2hex(modules[0])
            lost = self.left.get(key, 0) > 0 and len(modules) == 1
            self.left[key] = self.left.get(key, 0) - 1
        found = super().time(modules, subject, seconds, rounds)
        with self._lock:
            self.running -= 1
        return [Outcome("lost", error="gone")] if lost else found


def searched(log: TuningLog, decision: dict[str, int]) -> list[Trial]:
    return [t for t in log.read() if t.decision == decision and not t.final]


def test_candidates_are_measured_on_all_machines_at_once(tmp_path) -> None:
    fleet = Fleet(3)
    result = tuning_run.run(str(tmp_path), 12, runner=fleet)
    assert fleet.most == 3
    assert sum(decisions(result.log).values()) == 12 and set(decisions(result.log).values()) == {1}


def test_what_was_lost_with_its_machine_is_measured_again(tmp_path, largest) -> None:
    start = largest[largest.start]
    key = ms.utils.shash2hex(largest.candidate(largest.start).sch.mod)
    result = tuning_run.run(str(tmp_path), 6, runner=Fleet(2, [key]))
    found = searched(result.log, start)
    assert [trial.status for trial in found] == ["lost", "ok"]
    assert result.new_trials == 6 and len(Database(result.log.directory)) == 6


def test_what_loses_its_machine_twice_is_to_blame(tmp_path, largest) -> None:
    start = largest[largest.start]
    key = ms.utils.shash2hex(largest.candidate(largest.start).sch.mod)
    result = tuning_run.run(str(tmp_path), 6, runner=Fleet(2, [key], times=9))
    assert [trial.status for trial in searched(result.log, start)] == ["lost", "lost"]
    assert result.new_trials == 6
    tuning_run.run(str(tmp_path), 6, runner=Fleet(2))
    assert len(searched(result.log, start)) == 2, "and is not tried again"


# What is done with a log afterwards


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> TuningLog:
    """A log with a result of some decisions."""
    root = tmp_path_factory.mktemp("tuned")
    log = tuning_run.run(str(root), 18).log
    write_profile(DEVICE, root)
    return log


@pytest.mark.parametrize("name", HABITS)
def test_a_replayed_search_finds_the_best_that_was_recorded(tuned, name) -> None:
    kernels = logged_kernels(tuned, logged_device(tuned))
    # Two kernels share 18 trials, as the times say that are made of their modules.
    kernel = max(kernels, key=lambda kernel: len(kernel.tried))
    found = replay(kernel, name, HABITS[name], seeds=(1,))
    assert len(found.best) == len(kernel.tried) > 8
    assert list(found.best) == sorted(found.best, reverse=True) and found.best[-1] == 1
    for place in found.to_near:
        assert 1 <= place <= len(found.best)


def test_winners_are_measured_again_beside_nothing(tuned, tmp_path) -> None:
    kernel = next(iter(best(tuned)))
    (again,) = measure_again(tuned, kernel=kernel, into=tmp_path, apart=0, runner=FakeRunner())
    (trial,) = again.read()
    assert trial.final and trial.decision == best(tuned)[kernel].decision
    assert logged_device(again) == DEVICE, "planned by the same rates"


def test_what_cannot_be_measured_again_is_refused(tuned, tmp_path) -> None:
    with pytest.raises(LogError, match=r"has nothing of kernel r999t1f32 .* expected one of: "):
        measure_again(tuned, kernel="r999t1f32", into=tmp_path, apart=0, runner=FakeRunner())
    log = TuningLog(tmp_path / DEVICE.slug / SPEC.slug)
    write_profile(DEVICE, tmp_path)
    for trial in tuned.read():
        changed = {**trial.decision, "no_such_choice": 1}
        log.append(Trial(**{**_fields(trial), "decision": changed}))
    with pytest.raises(LogError, match=r"was decided as .*no_such_choice.* does not know"):
        measure_again(log, into=tmp_path, apart=0, runner=FakeRunner())


def test_a_decision_that_schedules_no_longer_offer_gives_way_to_the_default(
    tuned, tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("DEFT_TVM_UNTUNED", raising=False)
    kernels = best(tuned)
    assert logged_decisions(SPEC, DEVICE, tuned).by_kernel.keys() == kernels.keys()
    name, trial = next((name, trial) for name, trial in kernels.items() if trial.decision)
    choice = next(iter(trial.decision))
    log = TuningLog(tmp_path / DEVICE.slug / SPEC.slug)
    log.append(Trial(**{**_fields(trial), "decision": {**trial.decision, choice: 7777}}))
    told = rf"{name}: decision '{choice}' is 7777; expected one of .*: tune again"
    with pytest.warns(UserWarning, match=told):
        assert logged_decisions(SPEC, DEVICE, log).by_kernel == {}


def _fields(trial: Trial) -> dict:
    return {name: getattr(trial, name) for name in trial.__struct_fields__}

"""Tuning: the space, the search, the processes that run candidates, and what a kill leaves."""

from __future__ import annotations

import random
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from tuning_run import SPEC, WORKLOAD
from tvm import IRModule, s_tir, tirx
from tvm.s_tir import meta_schedule as ms

from deft_tvm.build import tasks_for
from deft_tvm.device import FEATURES, DeviceProfile
from deft_tvm.errors import WorkloadError
from deft_tvm.native import TORCH_POOL, compile_c
from deft_tvm.schedules import schedule, tiles_of
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region
from deft_tvm.tuning.budget import allot
from deft_tvm.tuning.defaults import default_decision, default_for
from deft_tvm.tuning.expected import expected
from deft_tvm.tuning.messages import Build, Built, Outcome, Time, Timed
from deft_tvm.tuning.process import Worker, WorkerDied, WorkerTimeout
from deft_tvm.tuning.runner import LocalRunner, WorkerRunner
from deft_tvm.tuning.space import Space, specialise
from deft_tvm.tuning.strategy import GreedySearch, new_cost_model, runner_result
from deft_tvm.tuning.subject import MERGE, subjects

DEVICE = DeviceProfile.detect()
TASKS = {task.name: task for task in tasks_for(SPEC, DEVICE)}
TILES = tiles_of(TASKS.values())
SUBJECTS = {subject.kernel: subject for subject in subjects(SPEC, WORKLOAD, TILES, DEVICE)}


def space(kernel: str) -> Space:
    return Space(SUBJECTS[kernel], TASKS[kernel])


@pytest.fixture(scope="module")
def largest() -> Space:
    """The space with the most decisions."""
    return max(map(space, SUBJECTS), key=len)


# The space


def test_every_decision_has_one_number(largest) -> None:
    found = [tuple(largest[number].items()) for number in range(len(largest))]
    assert len(set(found)) == len(found)
    assert [largest.number(dict(decision)) for decision in found] == list(range(len(largest)))


def test_a_decision_that_the_schedule_does_not_know_has_no_number(largest) -> None:
    decision = largest[0]
    name = next(iter(decision))
    assert largest.number(decision | {name: 12345}) is None
    assert largest.number(decision | {"another": 1}) is None
    assert largest.number({}) is None


def test_a_neighbour_differs_in_one_choice(largest) -> None:
    rng = random.Random(0)
    for number in range(0, len(largest), 7):
        other = largest.neighbour(number, rng)
        pairs = zip(largest[number].values(), largest[other].values(), strict=True)
        assert sum(one != two for one, two in pairs) == 1


def test_defaults_that_ship_are_taken_where_they_are_candidates(largest, monkeypatch) -> None:
    own = largest.decision_of(schedule(largest.task)[0].trace)
    names = [name for name, candidates in largest.table.items() if len(candidates) > 1]
    other = next(v for v in largest.table[names[0]] if v != own[names[0]])
    shipped = {names[0]: other, names[1]: 12345, "another": 3}
    monkeypatch.setattr("deft_tvm.tuning.defaults.default_decision", lambda *_: shipped)
    changed = Space(largest.subject, largest.task)
    assert changed[changed.start] == own | {names[0]: other}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_defaults_are_candidates_of_the_usual_attention(dtype) -> None:
    """Elsewhere what is no candidate is passed over; here it would be a slip."""
    spec = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128, dtype=dtype)
    device = DeviceProfile.nominal(features=FEATURES)
    few_and_many = [t for t in tasks_for(spec, device) if t.name.startswith(("r4t", "r128t"))]
    assert len(few_and_many) == 2
    for task in few_and_many:
        assert default_for(task) == default_decision(task.name, "llvm", device.features)


def test_what_metaschedule_samples_is_a_decision(largest) -> None:
    (sampled,) = largest.context().generate_design_space()
    number = largest.number(largest.decision_of(sampled.trace))
    assert number is not None
    tvm.ir.assert_structural_equal(largest.candidate(number).sch.mod, sampled.mod)


@pytest.mark.parametrize("kernel", SUBJECTS)
def test_decision_and_trace_replay_alike_on_the_dynamic_function(kernel) -> None:
    found = space(kernel)
    number = len(found) // 2
    trace = found.candidate(number).sch.trace
    dynamic = s_tir.Schedule(IRModule({found.task.symbol: found.task.computation}))
    dynamic.work_on(found.task.symbol)
    trace.apply_to_schedule(dynamic, remove_postproc=False)
    tvm.ir.assert_structural_equal(dynamic.mod, schedule(found.task, found[number])[0].mod)


def test_subjects_are_what_the_plan_launches() -> None:
    plan = next(iter(SUBJECTS.values())).launch().plan
    launched = [TILES[tile].name for tile, _, _ in plan.launches]
    assert list(SUBJECTS) == [*launched, MERGE]
    assert sum(len(SUBJECTS[name].launch().items) for name in launched) == plan.num_items


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(WorkloadError, match="few"):
        subjects(SPEC, "fewshot", TILES, DEVICE)


# What is expected of a launch


LATENT = AttentionSpec(
    num_q_heads=4,
    num_kv_heads=1,
    buffers=(CacheBuffer("latent", 1, 32, "float32"), CacheBuffer("rope", 1, 8, "float32")),
    k=Region(0, 0, 32),
    v=Region(0, 0, 32),
    rope=1,
    scale=0.2,
    page_size=4,
)
HEADS_FIRST = AttentionSpec.gqa(
    num_q_heads=4, num_kv_heads=2, head_dim=16, dtype="bfloat16", page_size=8, layout="HND"
)


@pytest.mark.parametrize("spec", [SPEC, LATENT, HEADS_FIRST], ids=["gqa", "latent", "heads_first"])
def test_expected_partials_merge_into_attention(spec) -> None:
    """The oracle of launches agrees with the oracle of rows, both float64."""
    workload = WORKLOAD if spec is SPEC else "forest:trees=2,prompt=300"
    tiles = default_tiles(spec, "llvm", frozenset(DEVICE.features))
    launches = [
        subject.launch()
        for subject in subjects(spec, workload, tiles, DEVICE)
        if subject.kernel != MERGE
    ]
    case, plan = launches[0].case, launches[0].plan
    wanted = case.reference()
    found = [torch.full(t.shape, torch.nan, dtype=torch.float64) for t in launches[0].outputs]
    for launch in launches:
        for tensor, part in zip(found, expected(launch).outputs, strict=True):
            assert bool((tensor.isnan() | part.isnan()).all()), "written twice"
            tensor[~part.isnan()] = part[~part.isnan()]
    out, lse, partial_out, partial_lse = found
    for k, row in enumerate(plan.merge_rows.tolist()):
        part = slice(*plan.merge_indptr[k : k + 2].tolist())
        lse[row] = partial_lse[part].logsumexp(0)
        out[row] = ((partial_lse[part] - lse[row]).exp()[..., None] * partial_out[part]).sum(0)
    torch.testing.assert_close(out, wanted.out, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, wanted.lse, atol=1e-12, rtol=0)


def test_a_result_that_is_missing_or_beside_is_wrong() -> None:
    launch = SUBJECTS[MERGE].launch()
    wanted = expected(launch)
    right = [tensor.clone() for tensor in wanted.outputs]
    assert wanted.error(right) == (0.0, True)
    rows = ~wanted.outputs[1].isnan().any(-1)
    off = [tensor.clone() for tensor in right]
    off[0][rows] += 1.0
    assert wanted.error(off) == (pytest.approx(1.0), False)
    missing = [tensor.clone() for tensor in right]
    missing[1][rows] = torch.nan
    assert wanted.error(missing) == (float("inf"), False)


# The search


def proposals(search: GreedySearch, found: Space, batches: int) -> list[int]:
    """Numbers in the order of proposal; the seconds of a decision are its number."""
    context, made = found.context(search), []
    context.pre_tuning(10**6, 4, [], None, new_cost_model())
    for _ in range(batches):
        candidates = context.generate_measure_candidates()
        if candidates is None:
            break
        made += search.proposed
        results = [runner_result([1e-3 * (1 + n)]) for n in search.proposed]
        context.notify_runner_results(candidates, results)
    return made


def decline_half(monkeypatch: pytest.MonkeyPatch, largest: Space) -> set[int]:
    """From now on a space of the size of `largest` has candidates for odd numbers and the start."""
    declined = set(range(0, len(largest), 2)) - {largest.start}
    candidate = Space.candidate

    def decline(self: Space, number: int) -> ms.MeasureCandidate:
        if len(self) == len(largest) and number in declined:
            raise ValueError("no such tile")
        return candidate(self, number)

    monkeypatch.setattr(Space, "candidate", decline)
    return declined


def refuse(number: int, error: str) -> None:
    raise AssertionError(error)


def test_the_search_begins_with_the_default_and_repeats_nothing(largest) -> None:
    made = proposals(GreedySearch(largest, {}, refuse), largest, 6)
    assert made[0] == largest.start
    assert len(set(made)) == len(made) == 1 + 5 * 4


def test_the_search_ends_when_all_is_tried() -> None:
    smallest = min((space(name) for name in SUBJECTS if len(space(name)) > 1), key=len)
    made = proposals(GreedySearch(smallest, {}, refuse), smallest, 10**6)
    assert sorted(made) == list(range(len(smallest)))


def test_the_search_depends_on_its_seed_and_on_what_was_tried_alone(largest) -> None:
    """In the batches before the cost model has a say; its training is not ours to repeat."""
    whole = proposals(GreedySearch(largest, {}, refuse), largest, 2)
    assert proposals(GreedySearch(largest, {}, refuse), largest, 2) == whole
    past = {whole[0]: (1e-3 * (1 + whole[0]),)}
    assert proposals(GreedySearch(largest, past, refuse), largest, 1) == whole[1:]
    assert proposals(GreedySearch(largest, past, refuse, seed=1), largest, 1) != whole[1:]


def test_a_decision_that_the_schedule_declines_is_told_once(largest, monkeypatch) -> None:
    declined = decline_half(monkeypatch, largest)
    told: list[int] = []
    made = proposals(GreedySearch(largest, {}, lambda number, _: told.append(number)), largest, 4)
    assert told and len(set(told)) == len(told)
    assert declined.issuperset(told) and declined.isdisjoint(made)


@pytest.mark.parametrize(
    ("trials", "made", "wanted"),
    [
        (8, (0, 0), (6, 2)),  # by time
        (8, (2, 2), (4, 0)),  # what was made counts
        (4, (0, 4), (0, 0)),  # nothing left
        (30, (0, 0), (20, 5)),  # no more than there are
    ],
)
def test_trials_follow_the_share_of_time(trials, made, wanted) -> None:
    keys = ("slow", "fast")
    found = allot(
        trials,
        {"slow": 3.0, "fast": 1.0},
        dict(zip(keys, made, strict=True)),
        {"slow": 20, "fast": 5},
    )
    assert tuple(found.values()) == wanted


# Candidates that misbehave

CRASH = "#include <stdlib.h>\nvoid deft_test(void) { abort(); }"
HANG = "void deft_test(void) { for (volatile int i = 0;; i = 0) {} }"


def library(tmp_path: Path, source: str) -> str:
    """A library that loads like an exported kernel and does something else."""
    entry = "int __tvm_ffi_kernel(void* a, void* b, int n, void* r) { deft_test(); return 0; }"
    path = tmp_path / "bad.c"
    path.write_text(f"{source}\n{entry}\n")
    (pool,) = compile_c(TORCH_POOL, tmp_path)
    out = str(path.with_suffix(".so"))
    undefined = "-Wl,--unresolved-symbols=ignore-all"
    subprocess.run(["cc", "-shared", "-fPIC", undefined, str(path), pool, "-o", out], check=True)
    return out


@pytest.fixture(scope="module")
def timer():
    worker = Worker("time")
    yield worker
    worker.close()


def test_a_crash_and_a_hang_end_the_candidate_alone(timer, tmp_path) -> None:
    merge = SUBJECTS[MERGE]
    with pytest.raises(WorkerDied, match="SIGABRT"):
        timer.ask(Time(merge, (library(tmp_path, CRASH),), "kernel", 0.1), Timed, 60)
    timer.wait_until_ready()
    with pytest.raises(WorkerTimeout, match="no answer within 3 s"):
        timer.ask(Time(merge, (library(tmp_path, HANG),), "kernel", 0.1), Timed, 3)
    assert timer.ask(Time(merge, (), "kernel", 0.1), Timed, 60).outcomes == ()


def test_a_worker_outlives_the_thread_in_which_it_was_started_again(timer, tmp_path) -> None:
    merge = SUBJECTS[MERGE]

    def crash() -> None:
        with pytest.raises(WorkerDied):
            timer.ask(Time(merge, (library(tmp_path, CRASH),), "kernel", 0.1), Timed, 60)
        timer.wait_until_ready()

    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    assert timer.ask(Time(merge, (), "kernel", 0.1), Timed, 60).outcomes == ()


def test_a_renewed_runner_times_in_another_process_what_it_has_compiled() -> None:
    subject = SUBJECTS[MERGE]
    task = next(task for task in tasks_for(SPEC, DEVICE) if task.name == MERGE)
    module = schedule(task)[0].mod
    with closing(LocalRunner()) as runner:
        (before,) = runner.time([module], subject, 0.05)
        process = runner._timer._process
        runner.renew()
        (after,) = runner.time([module], subject, 0.05)
        assert process.poll() is not None and runner._timer._process.pid != process.pid
    assert before.status == after.status == "ok"
    assert before.compile_s == after.compile_s, "compiled once"


def test_candidates_are_judged_and_timed() -> None:
    """One that is right, one of another scale, one that cannot be compiled."""
    subject = SUBJECTS[next(iter(SUBJECTS))]
    found = space(subject.kernel)
    other = AttentionSpec.gqa(
        num_q_heads=4, num_kv_heads=2, head_dim=32, page_size=4, scale=2 * SPEC.scale
    )
    task = next(task for task in tasks_for(other, DEVICE) if task.name == subject.kernel)
    wrong = specialise(task.computation, subject.launch().arguments)
    undefined = tirx.PrimFunc([], tirx.Evaluate(tirx.Var("x", "int32")))
    modules = [found.candidate(found.start).sch.mod]
    modules += [IRModule({task.symbol: function}) for function in (wrong, undefined)]
    runner = LocalRunner()
    try:
        outcomes = runner.time(modules, subject, 0.1)
    finally:
        runner.close()
    assert [outcome.status for outcome in outcomes] == ["ok", "wrong", "compile"]
    assert len(outcomes[0].latency_us) >= 6 and min(outcomes[0].latency_us) > 0
    assert outcomes[1].max_error is not None and outcomes[1].max_error > 1e-3
    assert "the largest error" in outcomes[1].error
    assert outcomes[2].compile_s is None and outcomes[2].error


class Answering:
    """Stands for a process that compiles and times; it dies of one module."""

    def __init__(self, deadly: str) -> None:
        self.deadly, self.modules = deadly, {}

    def ask(self, request: Build | Time, answer: type, seconds: float) -> Built | Timed:
        if isinstance(request, Build):
            self.modules[request.path] = request.module
            return Built(0.1)
        if any(self.modules[library] == self.deadly for library in request.libraries):
            raise WorkerDied("gone")
        return Timed(tuple(Outcome("ok", (1.0,)) for _ in request.libraries))


def test_of_several_that_are_timed_together_the_one_that_dies_fails_alone(largest) -> None:
    modules = [largest.candidate(number).sch.mod for number in (largest.start, 0)]
    worker: Any = Answering(str(tvm.ir.save_json(modules[1])))
    outcomes = WorkerRunner([worker], worker, "").time(modules, largest.subject, 0.1, rounds=6)
    assert [outcome.status for outcome in outcomes] == ["ok", "runtime"]
    assert outcomes[1].error == "gone"

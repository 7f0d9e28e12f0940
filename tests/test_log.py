"""The tuning log: what a reader makes of whatever a writer left behind."""

from __future__ import annotations

import msgspec
import pytest
from comparable import run_line

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tuning.defaults import default_decision
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import TuningLog, best, best_of, find_logs, log_roots, measured
from deft_tvm.tuning.probe import write_profile

SPEC = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=32, page_size=4)
DEVICE = DeviceProfile.nominal()


def trial(number: int = 0, **fields) -> Trial:
    tile = TileShape(16, 64, "float32")
    given = {
        "run": "a",
        "trial": number,
        "kernel": tile.name,
        "spec": str(SPEC),
        "workload": "few_shot",
        "tile": tile,
        "decision": {"rows": number},
        "status": "ok",
        "latency_us": (3.0, 1.0, 2.0),
        "device": DEVICE.slug,
    }
    return Trial(**given | fields)


@pytest.fixture
def log(tmp_path) -> TuningLog:
    return TuningLog(tmp_path / "a" / "b")


@pytest.fixture
def roots(tmp_path, monkeypatch) -> list:
    """The user's own logs and those that ship, empty; no environment variable."""
    monkeypatch.delenv("DEFT_TVM_LOGS", raising=False)
    folders = [tmp_path / "user", tmp_path / "shipped"]
    monkeypatch.setattr("deft_tvm.tuning.log.user_logs", lambda: folders[0])
    monkeypatch.setattr("deft_tvm.tuning.log.shipped_logs", lambda: folders[1:])
    return folders


def test_trials_come_back_as_they_were_written(log) -> None:
    written = [trial(0), trial(1, status="wrong", latency_us=(), max_error=0.5, error="off")]
    for one in written:
        log.append(one)
    assert list(TuningLog(log.directory).read()) == written
    assert log.read().skipped == 0


def test_a_log_that_is_not_there_is_empty(log) -> None:
    assert not log.exists()
    assert list(log.read()) == []


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_line_that_was_cut_off_costs_that_line_alone(log, kept) -> None:
    log.append(trial(0))
    log.append(trial(1))
    first, second = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + second[:kept])
    assert [one.trial for one in log.read()] == [0]
    assert log.read().skipped == 1
    log.append(trial(2))
    assert [one.trial for one in log.read()] == [0, 2]
    assert log.read().skipped == 1


def test_a_line_without_its_end_of_line_is_whole(log) -> None:
    log.append(trial(0))
    log.path.write_bytes(log.path.read_bytes().removesuffix(b"\n"))
    log.append(trial(1))
    assert [one.trial for one in log.read()] == [0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        *(b"\x00\xff\x00", b"{}", b'{"schema": 1}', b"[1, 2]", b"null"),
        b'{"schema": 1, "run": "\xff"}',
        b'{"schema": 1, "run": ' + b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_skipped_and_counted(log, damage) -> None:
    log.append(trial(0))
    log.path.write_bytes(damage + b"\n" + log.path.read_bytes())
    assert [one.trial for one in log.read()] == [0]
    assert log.read().skipped == 1


@pytest.mark.parametrize(
    "field",
    [
        {"latency_us": []},
        {"latency_us": [3.0, 0.0]},
        {"latency_us": [-1.0]},
        {"latency_us": [None]},  # as JSON has neither ∞ nor what is no number
        {"latency_us": "1.0"},
        {"anchor_us": [0.0, 1.0, 1.0]},
        {"probe_us": {"read": [-1.0, 1.0, 1.0]}},
        {"limit_us": 0.0},
        {"passes": [-1, 4]},
        {"passes": [1.5, 1.5]},
        {"passes": 3},
        {"time": "yesterday"},
        {"time": "2026-11-20"},
        {"time": "2026-11-20T10:00:00"},
        {"trial": -1},
    ],
    ids=str,
)
def test_values_that_nothing_measured_are_damage(log, field) -> None:
    log.append(trial(0))
    line = msgspec.json.decode(log.path.read_bytes())
    with log.path.open("ab") as file:
        file.write(msgspec.json.encode(line | field) + b"\n")
    assert [one.trial for one in log.read()] == [0]
    assert log.read().skipped == 1


def test_a_latency_that_is_infinite_is_damage(log) -> None:
    log.append(trial(0))
    log.path.write_bytes(log.path.read_bytes().replace(b"[3.0,", b"[1e999,"))
    assert (len(log.read()), log.read().skipped) == (0, 1)


def test_a_run_at_no_time_is_damage(log) -> None:
    log.append(run_line())
    log.path.write_bytes(log.path.read_bytes().replace(b"2026-11-20T10", b"then"))
    assert (log.read().runs, log.read().skipped) == ({}, 1)


def test_an_unknown_status_is_damage(log) -> None:
    log.append(trial(0))
    log.path.write_bytes(log.path.read_bytes().replace(b'"ok"', b'"fine"'))
    assert (len(log.read()), log.read().skipped) == (0, 1)


def test_a_newer_schema_is_refused(log) -> None:
    log.append(trial(0, schema=3))
    with pytest.raises(LogError, match=r"schema is 3; expected 2 or older: update deft_tvm"):
        log.read()


def test_a_line_of_the_first_schema_is_read(log) -> None:
    """As it was written before runs had lines of their own."""
    log.directory.mkdir(parents=True)
    log.path.write_text(
        '{"run":"20261122T003737-17667","trial":0,"kernel":"r4t16f32h8","spec":"gqa:hq=32,hkv=8,'
        'd=128,dtype=f32,page=16,layout=nhd","workload":"few_shot","decision":{"out_dims":64},'
        '"status":"ok","device":"amd-epyc-avx512bf16-2c","tile":{"lane_rows":4,"kv_tile":16,'
        '"operand":"float32","heads":8},"latency_us":[3.0,1.0,2.0],"compile_s":0.683,"max_error":'
        '5.46e-7,"error":"","best_us":2.0,"default":true,"final":true,"commit":"7588f8e",'
        '"versions":{"tvm":"0.27.0.post1"},"time":"2026-11-22T00:37:40+00:00","schema":1}\n'
    )
    (found,) = log.read()
    assert found.median_us == 2.0 and found.schema == 1 and found.final
    assert (found.anchor_us, found.passes, found.limit_us) == ((), (), None)
    assert log.read().runs == {} and log.read().skipped == 0


def test_fields_of_a_newer_writer_are_ignored(log) -> None:
    log.append(trial(0))
    line = msgspec.json.decode(log.path.read_bytes()) | {"clock_mhz": 3000}
    log.path.write_bytes(msgspec.json.encode(line) + b"\n")
    assert list(log.read()) == [trial(0, time=log.read().trials[0].time)]


def test_best_is_the_lowest_median_that_worked(log) -> None:
    log.append(trial(0, latency_us=(5.0, 5.0, 1.0)))
    log.append(trial(1, latency_us=(4.0, 4.0, 4.0)))
    log.append(trial(2, status="wrong", latency_us=()))
    log.append(trial(3, kernel="merge", tile=None, status="timeout", latency_us=()))
    assert {name: one.trial for name, one in best(log).items()} == {"r16t64f32": 1}


def test_best_believes_the_last_final_measurement(log) -> None:
    log.append(trial(0, latency_us=(1.0,)))
    log.append(trial(1, latency_us=(2.0,), final=True))
    log.append(trial(2, latency_us=(7.0,), final=True, run="b"))
    log.append(trial(3, latency_us=(6.0,), final=True, run="b"))
    assert best(log)["r16t64f32"].trial == 3


@pytest.mark.parametrize(("faster", "wins"), [(9, True), (8, False)])
def test_the_default_gives_way_to_what_is_surely_faster(log, faster, wins) -> None:
    """Of 10 rounds 9 are more than 5 + 0.98 √10 = 8.1."""
    log.append(trial(0, latency_us=(4.0,) * 10, default=True, final=True))
    log.append(trial(1, latency_us=(3.0,) * faster + (9.0,) * (10 - faster), final=True))
    assert best(log)["r16t64f32"].trial == int(wins)


def test_best_never_compares_workloads(log) -> None:
    log.append(trial(0, workload="small", latency_us=(1.0,)))
    log.append(trial(1, latency_us=(9.0,)))
    log.append(trial(2, latency_us=(8.0,)))
    assert best(log)["r16t64f32"].trial == 2


def spoken() -> dict:
    """Of each kernel the root of the log whose decision is taken."""
    found = best_of(find_logs(SPEC, DEVICE))
    return {kernel: log.directory.parents[1] for kernel, (log, _) in found.items()}


def test_logs_are_found_in_order(roots, tmp_path, monkeypatch) -> None:
    assert find_logs(SPEC, DEVICE) == []
    for root in reversed(roots):
        TuningLog(root / DEVICE.slug / SPEC.slug).append(trial())
        assert spoken() == {"r16t64f32": root}
    named = tmp_path / "named"
    monkeypatch.setenv("DEFT_TVM_LOGS", str(named))
    assert log_roots()[0] == named
    assert spoken() == {"r16t64f32": roots[0]}


def test_a_log_in_which_nothing_worked_hides_no_other(roots) -> None:
    """A tuning that was stopped before its first trial leaves the line of its run."""
    stopped, other = (TuningLog(root / DEVICE.slug / SPEC.slug) for root in roots)
    other.append(trial())
    stopped.append(run_line(spec=str(SPEC), device=DEVICE.slug))
    stopped.append(trial(status="timeout", latency_us=()))
    assert spoken() == {"r16t64f32": roots[1]}


def test_a_tuning_that_was_stopped_hides_no_kernel_of_a_log_that_was_finished(roots) -> None:
    """It has the defaults of some kernels, and searches whose best looks better than it is."""
    user, shipped = (TuningLog(root / DEVICE.slug / SPEC.slug) for root in roots)
    for number, kernel in enumerate(("both", "one", "searched")):
        shipped.append(trial(number, kernel=kernel, final=kernel != "searched"))
    user.append(trial(0, kernel="both", latency_us=(0.5,)))
    user.append(trial(1, kernel="searched"))
    user.append(trial(2, kernel="new"))
    of_user = {"searched": roots[0], "new": roots[0]}
    assert spoken() == {"both": roots[1], "one": roots[1], **of_user}
    user.append(trial(3, kernel="both", final=True))
    assert spoken() == {"both": roots[0], "one": roots[1], **of_user}


def test_a_log_of_another_device_is_not_found(roots) -> None:
    other = DeviceProfile.nominal(cores=64)
    TuningLog(roots[0] / other.slug / SPEC.slug).append(trial())
    assert find_logs(SPEC, DEVICE) == []


def test_measured_rates_replace_nominal_ones(roots) -> None:
    assert measured(DEVICE) == DEVICE
    rates = msgspec.structs.replace(DEVICE, read_bandwidth=1.0, measured=True, name="elsewhere")
    write_profile(rates, roots[1])
    assert measured(DEVICE) == msgspec.structs.replace(DEVICE, read_bandwidth=1.0, measured=True)


def test_a_damaged_profile_is_refused_by_name(roots) -> None:
    write_profile(DEVICE, roots[0]).write_text("{")
    with pytest.raises(LogError, match=r"device\.json cannot be read"):
        measured(DEVICE)


def test_the_first_default_that_fits_is_taken(roots) -> None:
    file = roots[1] / "default-llvm" / "decisions.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(
        msgspec.json.encode(
            [
                {"kernels": ["r*f32"], "features": ["avx512f"], "decision": {"rows": 32}},
                {"kernels": ["merge", "r*f32"], "decision": {"rows": 16}},
            ]
        )
    )
    assert default_decision("r16t64f32", "llvm", {"avx2", "avx512f"}) == {"rows": 32}
    assert default_decision("r16t64f32", "llvm", {"avx2"}) == {"rows": 16}
    assert default_decision("r16t64bf16", "llvm", {"avx512f"}) == {}
    assert default_decision("r16t64f32", "cuda", {"sm_90a"}) == {}


def test_a_damaged_file_of_defaults_is_refused(roots) -> None:
    file = roots[1] / "default-llvm" / "decisions.json"
    file.parent.mkdir(parents=True)
    file.write_text('[{"kernels": 3}]')
    with pytest.raises(LogError, match="no list of default decisions"):
        default_decision("merge", "llvm", ())

"""The stages of ``deft-tvm gpu-check`` by themselves, on a CPU: what they find, and going on."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from built import SMALL, artifact

from deft_tvm.bench.core import Cell
from deft_tvm.check import Exactness
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError
from deft_tvm.gpu_check import bench, exact, modules, rates, sanitize, sanitized, speeds, tune
from deft_tvm.gpu_check.cells import CELLS, DIFFERENT, FORESTS, SPEEDS, Check, forest_of
from deft_tvm.gpu_check.lines import Lines, last_line
from deft_tvm.gpu_check.measuring import limited
from deft_tvm.gpu_check.rates import Rates
from deft_tvm.gpu_check.rotation import CACHES, MOST_COPIES, count_of, rotated
from deft_tvm.gpu_check.speeds import Begun, Beside, Found, Ours, difference, verdict
from deft_tvm.gpu_check.table import report, rows_of
from deft_tvm.limit import Limit
from deft_tvm.pytorch import TreeAttention
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning import final
from deft_tvm.tuning.passes import ALONE, IN_TURN
from deft_tvm.workloads import tensors

FEW_SHOT = "few_shot:prompt=20,branches=3,tokens=5"
HERE = DeviceProfile.detect()
KNOWN = Rates(HERE, copy_bandwidth=1e10)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One module is there, and nothing is measured or kept outside."""
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", str(artifact(SMALL)))
    monkeypatch.setenv("DEFT_TVM_LOGS", str(tmp_path / "logs"))
    monkeypatch.setattr(Rates, "of", lambda device: KNOWN)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a stage's `main` with options; its exit code and what it printed."""

    def run(main, *given, options: tuple[str, ...] = (), out: bool = True) -> tuple[int, list[str]]:
        folder = ("--out", str(tmp_path / "out")) if out else ()
        monkeypatch.setattr(sys, "argv", ["stage", "--device", "cpu", *folder, *options])
        with pytest.raises(SystemExit) as ended:
            main(*given)
        code = ended.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().out.splitlines()

    return run


# What is checked


def test_cells_are_different_and_can_all_be_read() -> None:
    canonical = [cell.canonical for cell in CELLS]
    assert len(set(canonical)) == len(CELLS)
    for workload in {cell.workload for cell in CELLS}:
        assert forest_of(workload).num_rows > 0
    options = [AttentionSpec.parse(cell.spec) for cell in CELLS]
    assert {spec.page_size for spec in options} >= {1, 2, 16, 64, 128}
    assert {spec.layout for spec in options} == {"NHD", "HND"}
    assert {spec.dtype for spec in options} == {"bfloat16", "float16", "float32"}
    for has in ("window", "soft_cap", "sinks", "scaled", "tied"):
        assert {bool(getattr(spec, has)) for spec in options} == {False, True}


def test_a_random_forest_is_that_of_its_seed() -> None:
    one, same, other = (forest_of(f"random:{seed}") for seed in (3, 3, 4))
    assert (one.parents == same.parents).all() and (one.lengths == same.lengths).all()
    assert one.num_tokens != other.num_tokens


def test_exactness_is_told_line_by_line(ask) -> None:
    workloads = [FEW_SHOT, "no_such_workload"]
    code, (first, second, *_, last) = ask(exact.main, [str(SMALL)], workloads, out=False)
    assert code == 1
    assert first.startswith(f"exact {SMALL} few_shot") and "out_error" in first
    assert second.startswith(f"WRONG {SMALL} no_such_workload")
    assert last == "1 of 2 are not exact"


def test_all_kinds_of_trees_are_exact(ask) -> None:
    workloads = [*FORESTS, *(f"random:{seed}" for seed in range(10))]
    code, printed = ask(exact.main, [str(SMALL)], workloads)
    assert code == 0, printed
    assert len(printed) == len(workloads) + 1


def test_caches_without_pages_are_exact(monkeypatch, ask) -> None:
    monkeypatch.setattr(exact, "CELLS", (Check(str(SMALL), FEW_SHOT, "contiguous"),))
    code, (line, last) = ask(exact.main)
    assert code == 0 and line.startswith(f"exact {SMALL} {FEW_SHOT} contiguous")
    assert last == "0 of 1 are not exact"


def test_a_first_run_may_be_a_compiled_one(monkeypatch) -> None:
    from deft_tvm.gpu_check.ways import compiled

    # Another object than that of any run before, of which nothing is known yet.
    attention = TreeAttention(AttentionSpec.parse(str(SMALL)), artifact(SMALL))
    program = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: program(f, fullgraph=True, backend="aot_eager")
    )
    assert compiled(attention, forest_of(FEW_SHOT)).holds


def test_exact_goes_on_after_what_it_has_and_tries_again_what_failed(ask) -> None:
    ask(exact.main, [str(SMALL)], [FEW_SHOT, "nothing"])
    code, printed = ask(exact.main, [str(SMALL)], [FEW_SHOT, "nothing", "sequences:tokens=9"])
    assert code == 1
    assert sum(line.startswith("exact") for line in printed) == 1
    assert sum(line.startswith("WRONG") for line in printed) == 1
    code, printed = ask(exact.main, [str(SMALL)], [FEW_SHOT, "nothing"], options=("--go-on",))
    assert (code, printed) == (1, ["1 of 2 are not exact"])
    code, printed = ask(exact.main, [str(SMALL)], [FEW_SHOT], options=("--again",))
    assert printed[0].startswith("exact") and len(printed) == 2


def test_exact_says_what_had_no_time(ask) -> None:
    workloads = [FEW_SHOT, "sequences:tokens=9"]
    code, printed = ask(exact.main, [str(SMALL)], workloads, options=("--minutes", "0"))
    assert code == 1
    assert printed[-2:] == [
        "1 had no time; the same command goes on with them",
        "0 of 2 are not exact",
    ]


@pytest.mark.parametrize("main", [exact.main, sanitize.main, bench.main])
def test_no_cell_at_all_is_refused(ask, main) -> None:
    with pytest.raises(InputError, match="--only is 'nonsense'; expected a part of the name of a"):
        ask(main, options=("--only", "nonsense"))


@pytest.mark.parametrize("option", ["--minutes", "--peer-seconds"])
def test_numbers_of_a_stage_are_finite(ask, option: str) -> None:
    assert ask(bench.main, options=(option, "nan")) == (2, [])


def test_a_stage_takes_no_folder_of_another_device(ask, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "device.txt").write_text("nvidia-h200\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"what was found of nvidia-h200; expected a new folder"):
        ask(exact.main, [str(SMALL)], [FEW_SHOT])


def test_the_table_of_no_file_is_refused(tmp_path: Path) -> None:
    for path, told in (
        ("/nope", "deft-tvm: /nope: No such file or directory\n"),
        (str(tmp_path), f"deft-tvm: {tmp_path}: Is a directory\n"),
        (__file__, f"deft-tvm: FILE is {__file__!r}, which has no line of bench; expected bench"),
    ):
        command = (sys.executable, "-m", "deft_tvm.gpu_check.table", path)
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.startswith(told)


def test_a_module_that_cannot_be_built_is_told(monkeypatch, ask) -> None:
    monkeypatch.setattr(exact, "build_missing", lambda specs, kind: {str(SMALL): "no room"})
    code, printed = ask(exact.main, [str(SMALL)], [FEW_SHOT])
    assert code == 1 and printed[0] == f"WRONG {SMALL} {FEW_SHOT}: no room"


def test_modules_that_are_there_are_not_built(capsys) -> None:
    assert modules.build_missing([str(SMALL)], "cpu") == {}
    assert capsys.readouterr().out == ""


def test_modules_are_built_in_other_processes_and_a_failure_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    other = "gqa:hq=2,hkv=1,d=16,dtype=f32,page=4,layout=nhd"
    (spec, why), *rest = modules.build_missing([str(SMALL), other], "cpu", 1).items()
    assert spec == other and why.startswith("NotADirectoryError: ") and not rest
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 of 2 modules are to be built"
    assert second == f"built {other}: {why}"


# Tensors on another device


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data stand for those on a GPU: torch refuses to mix them with a CPU's."""
    import torch._dynamo

    made = sys.modules["deft_tvm.workloads.tensors"]
    monkeypatch.setattr(made, "_normal", lambda _, *shape: torch.randn(shape, device="meta"))
    generator = torch.Generator
    monkeypatch.setattr("torch.Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)


@pytest.mark.parametrize(
    "spec",
    [
        "gqa:hq=4,hkv=2,d=16,dtype=bf16,window=33,cap=30,sinks=yes",
        "gqa:hq=4,hkv=2,d=16,dtype=bf16,kv_dtype=e4m3",
        "mla:hq=4,d=32,rope=16,scale=0.1,dtype=bf16,layout=hnd",
    ],
)
@pytest.mark.parametrize("workload", ["several_rows", "empty_nodes"])
def test_the_oracle_stays_on_the_device_of_its_tensors(elsewhere, spec: str, workload: str) -> None:
    case = tensors(forest_of(workload), AttentionSpec.parse(spec), device="meta")
    assert {tensor.device.type for tensor in (case.q, *case.layer)} == {"meta"}
    found = case.reference()
    assert found.out.is_meta and found.lse.is_meta
    assert found.out.shape == (case.forest.num_rows, case.spec.num_q_heads, case.spec.v_width)


# Kernels under the sanitizer


def test_all_tile_classes_of_a_gpu_are_launched() -> None:
    from deft_tvm.plan import make_plan
    from deft_tvm.workloads.tensors import shuffled_pages

    for text in DIFFERENT:
        spec = AttentionSpec.parse(text)
        tiles = default_tiles(spec, "cuda", frozenset({"sm_90", "sm_90a"}))
        left = {*(tile.name for tile in tiles), "merge"}
        for forest, deterministic in sanitized.forests(spec.group, tiles):
            pages = shuffled_pages(forest, spec)
            plan = make_plan(forest, pages, spec, tiles, HERE, deterministic=deterministic)
            left -= sanitized.launched(plan)
        assert not left, text


def test_all_kernels_of_a_module_run(capsys) -> None:
    assert sanitized.run_all(SMALL, "cpu") == []
    assert "merge" in capsys.readouterr().out


def test_a_sanitizer_that_is_missing_is_a_failure(ask, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sanitize, "PLACES", ())
    code, (line,) = ask(sanitize.main, [str(SMALL)])
    assert code == 1 and line.startswith("missing: compute-sanitizer is neither on PATH")


SCRIPT = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
case "$2" in
    memcheck) echo "========= ERROR SUMMARY: 0 errors"; exit 0;;
    racecheck) echo "========= Error: hazard"; echo "========= RACECHECK SUMMARY: 1"; exit 99;;
    *) echo "no such tool"; exit 1;;
esac
"""


def test_verdicts_of_the_sanitizer_are_lines_and_clean_ones_are_kept(
    ask, tmp_path: Path, monkeypatch
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SCRIPT, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    tools = ("--tools", "memcheck,racecheck,other")
    code, printed = ask(sanitize.main, [str(SMALL)], options=tools)
    assert code == 1 and printed[-1] == "2 of 3 are not clean, 0 had no time"
    assert f"clean memcheck {SMALL}" in printed and f"found racecheck {SMALL}" in printed
    assert f"failed other {SMALL}" in printed
    code, printed = ask(sanitize.main, [str(SMALL)], options=("--tools", "memcheck"))
    assert (code, printed) == (0, ["0 of 1 are not clean, 0 had no time"])


# Times


def test_bench_times_ours_then_groupings_then_peers(ask, tmp_path: Path) -> None:
    cells = [Cell(FEW_SHOT, str(SMALL)), Cell("sequences:count=2,tokens=9", str(SMALL))]
    options = ("--peers", "sequences,masked,no_such_peer")
    code, printed = ask(bench.main, cells, options=options)
    assert code == 0
    kind = f"{SMALL} {FEW_SHOT}"
    times = [line for line in printed if line.startswith(str(SMALL))]
    assert times[0].startswith(f"{kind} ours: ") and times[1].endswith(" µs")
    assert times[2].startswith(f"{kind} node: ")
    assert times[8] == f"{kind} no_such_peer: not timed: KeyError: 'no_such_peer'"
    assert times[10].startswith(f"{kind} sequences: ")
    lines: Lines = Lines(tmp_path / "out" / bench.FILE, Found)
    begun, ours, *_ = lines.found
    assert isinstance(begun, Begun) and begun.rates == KNOWN
    assert isinstance(ours, Ours) and ours.exactness is not None and ours.exactness.holds
    assert ours.plan > 0 and ours.limit is not None and ours.limit.num_bytes > 0
    besides = [line for line in lines.found if isinstance(line, Beside) and not line.failed]
    assert {line.name for line in besides} == {*speeds.PAPERS, "sequences", "masked"}
    assert all(line.max_error < 1e-4 and line.rms_error < 1e-4 for line in besides)
    code, printed = ask(bench.main, cells, options=options)
    again = [line for line in printed if line.startswith(str(SMALL))]
    assert code == 0 and len(again) == 2 and all("no_such_peer" in line for line in again)


def test_bench_says_what_had_no_time_and_goes_on(ask) -> None:
    cells = [Cell(FEW_SHOT, str(SMALL))]
    code, printed = ask(bench.main, cells, options=("--minutes", "0", "--peers", "masked"))
    assert code == 1
    assert printed[-1] == "some had no time; the same command goes on with them"
    code, printed = ask(bench.main, cells, options=("--no-groupings", "--peers", "masked"))
    assert code == 0 and [line.rsplit(" ", 3)[1] for line in printed[:2]] == ["ours:", "masked:"]


def test_a_cell_that_cannot_be_made_is_told(ask) -> None:
    cells = [Cell("nothing", str(SMALL))]
    code, printed = ask(bench.main, cells, options=("--no-groupings", "--peers", "masked"))
    assert code == 0
    assert "not timed: WorkloadError" in printed[0]
    assert printed[1].endswith("WorkloadError: " + printed[1].partition("WorkloadError: ")[2])
    assert any(line.startswith("left out ours, 1 times: WorkloadError") for line in printed)


def test_what_is_wrong_is_not_timed() -> None:
    ours = torch.randn(8, 4, 16)
    assert verdict(*difference(ours, ours), bound=0.0) == ""
    rounded = ours.bfloat16().float()
    assert verdict(*difference(rounded, ours), bound=0.02) == ""
    assert verdict(*difference(ours + 0.1, ours), bound=1.0).startswith("it is wrong: off by ")
    assert verdict(*difference(ours.fill_(torch.nan), rounded), bound=1.0)


def test_copies_are_as_many_as_the_cache_asks_for() -> None:
    case = tensors(forest_of(FEW_SHOT), SMALL)
    kv = Limit.of(case.forest, SMALL).num_bytes

    def device(cache: int) -> DeviceProfile:
        import msgspec

        return msgspec.structs.replace(HERE, kind="cuda", l2_bytes=cache)

    assert count_of(case, HERE) == 1
    assert count_of(case, device(kv)) == CACHES + 1
    assert count_of(case, device(1000 * kv)) == MOST_COPIES
    first, other = rotated(case, 2)
    assert first is case and other.pages is case.pages
    assert all((a != b).any() for a, b in zip(first.buffers, other.buffers, strict=True))
    assert (first.q != other.q).all()


def test_a_copy_of_a_case_is_run_by_the_same_plan() -> None:
    case = tensors(forest_of(FEW_SHOT), SMALL)
    attention = TreeAttention(SMALL)
    attention.plan(case.forest, case.pages)
    other = rotated(case, 2)[1]
    out, _ = attention.run(other.q, other.kv)
    assert (out.double() - other.reference().out).abs().max() < 1e-4


def test_the_table_names_the_best_peer_and_the_floor() -> None:
    cell, spec = Cell(FEW_SHOT, str(SMALL)), str(SMALL)
    exactness = Exactness(0.0, 1.0, 0.0, 1.0)
    limit = Limit(num_bytes=10**5, flops=10)
    found: list[Found] = [
        Begun.now(KNOWN),
        Ours(cell=cell, seconds=(2e-5,), plan=1e-5, limit=limit, exactness=exactness),
        Beside(cell=cell, name="node", seconds=(4e-5,)),
        Beside(cell=cell, name="slow", seconds=(9e-5,)),
        Beside(cell=cell, name="fast", seconds=(3e-5,), in_graph=False),
        Beside(cell=cell, name="broken", failed="ValueError: no"),
        Ours(cell=Cell("other", spec), failed="too late"),
    ]
    (row,) = rows_of(found)
    assert row.best is not None and row.best.name == "fast"
    assert row.ratio == pytest.approx(1.5) and row.floor == pytest.approx(1e-5)
    lines = report(found).splitlines()
    assert lines[0].split()[:2] == ["attention", "workload"]
    assert "20.00" in lines[1] and "50%" in lines[1] and "fast (no graph)" in lines[1]
    assert "1.50×" in lines[1] and "2.00×" in lines[1] and lines[1].endswith("yes")
    assert "1.50× the best peer: geometric mean of 1 cells" in lines
    assert "4.50× slow, 1 cells" in lines and "2.00× node, 1 cells" in lines
    assert "left out broken, 1 times: ValueError: no" in lines


def test_cells_of_bench_are_interleaved_and_take_recorded_trees() -> None:
    cells = speeds.cells_of(["a.json"])
    assert len(set(cells)) == len(cells) == (len(speeds.WORKLOADS) + 1) * len(SPEEDS)
    assert {cell.spec for cell in cells[: len(SPEEDS)]} == set(SPEEDS)
    assert cells[-1].workload == "recorded:path=a.json"
    for workload in speeds.WORKLOADS:
        forest_of(workload)


def test_rates_are_kept_for_other_stages(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rates", "--device", "cpu", "--out", str(out)])
    rates.main()
    assert json.loads(capsys.readouterr().out)["copy_bandwidth"] == 1e10
    monkeypatch.setattr(Rates, "of", lambda device: pytest.fail("measured again"))
    assert rates.rates_here(out, HERE) == KNOWN
    (out / rates.FILE).write_bytes(b'{"device": ')
    monkeypatch.setattr(Rates, "of", lambda device: KNOWN)
    assert rates.rates_here(out, HERE) == KNOWN, "measured again where they are damaged"
    monkeypatch.setattr(Rates, "of", lambda device: pytest.fail("measured again"))
    assert rates.rates_here(out, HERE) == KNOWN


def test_peers_that_compile_do_so_in_processes_of_their_own(ask, monkeypatch) -> None:
    from deft_tvm.gpu_check import warm

    monkeypatch.setattr(warm, "SLOW", tuple(name for name in warm.PEERS if name != "masked"))
    code, printed = ask(warm.main, [str(SMALL)], options=("--at-once", "1"))
    assert code == 0 and len(printed) == 1
    assert printed[0].startswith(f"ok masked {SMALL}, ")
    code, printed = ask(warm.main, [str(SMALL)], options=("--minutes", "0"))
    assert (code, printed) == (1, [f"no time for masked with {SMALL}"])


# Lines


def test_a_line_that_was_cut_off_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines: Lines = Lines(path, Found)
    lines.add(Beside(cell=Cell("a", "b"), name="c"))
    with open(path, "ab") as file:
        file.write(b'{"type":"Besi')
    again: Lines = Lines(path, Found)
    assert len(again.found) == 1
    again.add(Beside(cell=Cell("a", "b"), name="d"))
    assert [line.name for line in Lines(path, Found).found] == ["c", "d"]
    assert Lines(path, Found, again=True).found == [] and not path.exists()


def test_the_last_line_of_an_error_is_what_it_says() -> None:
    assert last_line(ValueError("a\nb \n\n")) == "ValueError: b"
    assert last_line(ValueError()) == "ValueError: "


def test_what_never_ends_is_interrupted() -> None:
    import time

    with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"), limited(0.05):
        time.sleep(60)
    with limited(60):
        pass


# Tuning


def test_tune_searches_builds_and_goes_on(ask, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("deft_tvm.tuning.probe.probe", lambda device: device)
    monkeypatch.setitem(final.APART, "cpu", 0.0)
    for planned in (IN_TURN, ALONE):
        monkeypatch.setitem(planned.passes, "cpu", 1)
        monkeypatch.setitem(planned.most, "cpu", 1)
    options = ("--trials", "1", "--minutes", "5")
    code, printed = ask(tune.main, [str(SMALL)], [FEW_SHOT], options=options)
    assert code == 0, printed
    log = tmp_path / "logs" / HERE.slug / SMALL.slug / "trials.jsonl"
    assert f"log {log}" in printed and log.is_file()
    assert (log.parents[1] / "device.json").is_file()
    module = next(line for line in printed if line.startswith("module "))
    assert (Path(module.removeprefix("module ")) / "module.so").is_file()
    code, printed = ask(tune.main, [str(SMALL)], [FEW_SHOT], options=options)
    assert code == 0 and any("0 new trials" in line for line in printed)


def test_tune_says_what_had_no_time(ask, monkeypatch) -> None:
    monkeypatch.setattr("deft_tvm.tuning.probe.probe", lambda device: device)
    code, printed = ask(tune.main, [str(SMALL)], options=("--minutes", "0"))
    assert code == 1 and printed[-1] == "1 had no time; the same command goes on with them"

"""Benchmarks: what is measured, what no one can beat, what is kept, and what counts as slower."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from small import FEW_SHOT, SPEC, attention, module

from deft_tvm import bench, workloads
from deft_tvm.bench import core, report
from deft_tvm.bench.compare import Verdict, compare
from deft_tvm.bench.measure import Measurement
from deft_tvm.bench.record import SCHEMA, Record
from deft_tvm.bench.step import MERGE, OURS, PARTIAL, PLAN, RUN, outputs, parts
from deft_tvm.check import check
from deft_tvm.errors import InputError, LogError
from deft_tvm.limit import PRODUCT, PRODUCT_SIZE, READ, READ_BYTES, Limit
from deft_tvm.peers import QUICK, peer
from deft_tvm.plan import GROUPINGS
from deft_tvm.pytorch import load
from deft_tvm.spec import AttentionSpec
from deft_tvm.timing import Summary, Timing
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse, tensors


def measured(**options: object) -> Measurement:
    case = tensors(parse(FEW_SHOT).forest, SPEC)
    return bench.measure(FEW_SHOT, case, attention(), budget=0.01, **options)  # type: ignore


def test_measurement_has_every_call_and_counts_its_traffic() -> None:
    found, attn = measured(), attention()
    attn.plan(parse(FEW_SHOT).forest, tensors(parse(FEW_SHOT).forest, SPEC).pages)
    assert list(found.timings) == [OURS, *QUICK, READ, PRODUCT]
    assert set(found.speedups()) == set(QUICK)
    assert list(found.speedups()) == sorted(QUICK, key=lambda name: found.timings[name].median)
    assert found.traffic == attn.traffic
    assert found.left_out == {}
    assert set(found.parts) == {PLAN, RUN, PARTIAL, MERGE}


def test_other_groupings_and_products_on_request() -> None:
    others = tuple(name for name in GROUPINGS if name != "auto")
    found = measured(peers=(), groupings=others, between=True)
    assert set(found.groupings) == {OURS, *others}
    assert found.grouping in others
    assert found.between_ratio.low > 0
    assert found.product_ratio.low > 0


def test_the_parts_of_a_run_do_what_the_run_does() -> None:
    case, attn = tensors(parse(FEW_SHOT).forest, SPEC), load(module(), grouping="node")
    assert check(case, attn).holds
    out, lse = attn.run(case.q, case.kv)
    found = outputs(case)
    found[0].fill_(torch.nan)  # new memory may hold what the run before it left
    calls = parts(case, attn, *found)
    calls[PARTIAL]()
    assert not torch.equal(found[0], out)
    calls[MERGE]()
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)


def test_a_wrong_answer_is_an_error_beyond_its_bound() -> None:
    case, attn = tensors(parse(FEW_SHOT).forest, SPEC), attention()
    run = attn.run
    attn.run = lambda *given, **named: tuple(x + 1e-3 for x in run(*given, **named))  # type: ignore
    assert not check(case, attn).holds
    attn.run = lambda *given, **named: tuple(x * torch.nan for x in run(*given, **named))  # type: ignore
    assert check(case, attn).out_error == float("inf")


def test_copies_that_would_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MOST_COPIED", 1 << 18)
    found = measured(peers=["masked", "folded"])
    assert list(found.peers) == ["masked"]
    assert list(found.left_out) == ["folded"]


def test_a_peer_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Measurement.__module__], "LONGEST_CALL", 0.0)
    found = measured(peers=["masked"])
    assert list(found.peers) == []
    assert "one call takes" in found.left_out["masked"]


def test_unknown_peer() -> None:
    with pytest.raises(InputError, match=r"peer is 'flash'; expected one of sequences, folded"):
        measured(peers=["flash"])


def test_the_limit_is_the_slower_of_bytes_and_products() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
    limit = Limit.of(parse("few_shot:prompt=100,branches=3,tokens=10").forest, spec)
    assert limit.num_bytes == (100 + 3 * 10) * 2 * 2 * 64 * 4
    assert limit.flops == 3 * 110 * 8 * 2 * 2 * 64
    assert limit.seconds(READ_BYTES, 0.0) == pytest.approx(limit.num_bytes)
    assert limit.seconds(0.0, 2 * 1024**3) == pytest.approx(limit.flops)


def test_the_limit_reads_what_a_window_leaves() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64, window=10)
    assert Limit.of(parse("long:tokens=1000").forest, spec).num_bytes == 10 * 2 * 2 * 64 * 4


def test_a_limit_is_of_the_tokens_that_rows_see() -> None:
    """The row at position 12 sees three of its node and one before them; of the others nobody."""
    spec = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16, window=4)
    forest = Forest.from_parents([-1, 0, 0], [10, 3, 7], [0, 1, 0])
    limit = Limit.of(forest, spec)
    assert limit == Limit(num_bytes=4 * 2 * 2 * 16 * 4, flops=4 * 2 * (16 + 16) * 4)
    whole = Limit.of(forest, replace(spec, window=None))
    assert (whole.num_bytes, whole.flops) == (limit.num_bytes * 13 / 4, limit.flops * 13 / 4)


def test_a_limit_is_the_longer_of_reading_and_multiplying_in_each_round() -> None:
    limit = Limit(num_bytes=READ_BYTES // 2, flops=4 * PRODUCT_SIZE**3)
    timings = {
        READ: Timing((8.0, 8.0, 2.0)),
        PRODUCT: Timing((1.0, 3.0, 4.0)),
        "ours": Timing((8.0, 8.0, 8.0)),
    }
    assert limit.rounds(timings) == (4.0, 6.0, 8.0)
    assert limit.share(timings, "ours") == Summary(0.75, 0.5, 1.0)


def test_the_core_set_covers_everything_twice_in_forty_cells() -> None:
    cells = [(workloads.parse(cell.workload), AttentionSpec.parse(cell.spec)) for cell in core.CORE]
    assert len(set(core.CORE)) == len(cells) <= 40

    def count(of: object) -> int:
        return [of in (w.name.partition(":")[0], s.dtype) for w, s in cells].count(True)

    for named in (*workloads.FAMILIES, "float32", "bfloat16"):
        assert count(named) >= 2, named
    variants = (core.MHA, core.GQA_4, core.GQA_8, core.MQA, core.MLA, core.GLA_2, core.GTA)
    for variant in variants:
        assert sum(cell.spec.startswith(f"{variant},") for cell in core.CORE) >= 2, variant
    assert {(spec.layout, spec.page_size) for _, spec in cells} == {("NHD", 16)}


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = Record.of(
        [measured(peers=["masked"], between=True)], tmp_path / "new" / "record.jsonl"
    )
    assert Record.read(tmp_path / "new" / "record.jsonl") == record
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["record.jsonl"]


def test_an_interrupted_record_replaces_nothing(tmp_path: Path) -> None:
    path, before = tmp_path / "record.jsonl", measured(peers=())
    Record.of([before], path)

    def interrupted():
        yield measured(peers=())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Record.of(interrupted(), path)
    assert Record.read(path).measurements == (before,)
    assert len(Record.read(path.with_name("record.jsonl.partial")).measurements) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "is no file of measurements"),
        ("{}", "is no file of measurements"),
        ('{"schema": 99}', f"schema is 99; expected at most {SCHEMA}"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "record.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LogError, match=message):
        Record.read(path)


def _record(milliseconds: list[float], machine: float = 1.0) -> Record:
    """Of one cell whose limit is a millisecond, on a machine that is so much slower."""
    own = Timing(tuple(1e-3 * machine * each for each in milliseconds))
    rounds = len(own.seconds)
    read = Timing((1e-3 * machine,) * rounds)
    timings = {OURS: own, READ: read, PRODUCT: Timing((1e-9,) * rounds)}
    limit = Limit(num_bytes=READ_BYTES, flops=1)
    found = msgspec.structs.replace(measured(peers=()), timings=timings, limit=limit)
    return msgspec.structs.replace(Record.of([]), measurements=(found,))


@pytest.mark.parametrize(
    ("after", "machine", "verdict"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.1, 2.0], 1.0, Verdict.SAME),
        ([2.0, 2.1, 1.9, 2.0, 2.1, 2.0], 3.0, Verdict.SAME),
        ([2.4, 2.5, 2.3, 2.4, 2.5, 2.4], 1.0, Verdict.SLOWER),
        ([1.6, 1.5, 1.7, 1.6, 1.5, 1.6], 2.0, Verdict.FASTER),
        ([2.4, 2.5, 1.9, 2.4, 2.5, 2.4], 1.0, Verdict.SAME),
        ([2.21, 2.22, 2.20, 2.21, 2.22, 2.21], 1.0, Verdict.SLOWER),
        ([2.06, 2.07, 2.06, 2.06, 2.07, 2.06], 1.0, Verdict.SAME),
    ],
)
def test_slower_is_what_noise_and_the_machine_do_not_explain(
    after: list[float], machine: float, verdict: Verdict
) -> None:
    before = _record([2.0, 2.05, 1.98, 2.0, 2.04, 2.0])
    assert [change.verdict for change in compare(before, _record(after, machine))] == [verdict]


def test_records_of_two_devices_or_of_nothing_in_common_are_refused() -> None:
    one = _record([2.0] * 6)
    origin = msgspec.structs.replace(one.origin, device="elsewhere")
    told = rf"is of elsewhere; expected one of {one.origin.device}, as shares of two devices"
    with pytest.raises(InputError, match=told):
        compare(msgspec.structs.replace(one, origin=origin), one)
    (found,) = one.measurements
    other = msgspec.structs.replace(found, workload="beam")
    told = rf"has 1 other measurements; expected some of the same, as of {FEW_SHOT} with gqa:"
    with pytest.raises(InputError, match=told):
        compare(msgspec.structs.replace(one, measurements=(other,)), one)
    assert len(compare(msgspec.structs.replace(one, measurements=(other, found)), one)) == 1


def test_a_record_has_a_place_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "record.jsonl"):
        measuring = iter([measured(peers=())])
        with pytest.raises(LogError, match=f"{path} cannot be written: .*; expected a file in a"):
            Record.of(measuring, path)
        assert next(measuring), "it was not asked for"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_record_without_a_measurement_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Record.of((1 // 0 for _ in range(1)), tmp_path / "record.jsonl")  # type: ignore
    assert list(tmp_path.iterdir()) == []


def test_tables_say_what_was_measured() -> None:
    found = measured(peers=["masked"], groupings=("node",), between=True)
    for columns, rows in (
        (report.SPEED, report.speed([found])),
        (report.PARTS, report.parts([found])),
        (report.GROUPED, report.grouped([found])),
        (report.CALLS, report.calls(found)),
    ):
        assert {len(row) for row in rows} == {len(columns)}
        text = report.markdown(columns, rows)
        assert text.count("\n") == len(rows) + 2
    assert report.speed([found])[0][:2] == (FEW_SHOT, "gqa 8/2 d64 f32")
    assert "geometric mean of 1 cells" in report.summary([found])[0]

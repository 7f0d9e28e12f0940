"""How often `compare` errs, by measurements of a noisy machine in which nothing changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from comparable import SPEC

from deft_tvm.compare.comparison import Comparison, Verdict, compare
from deft_tvm.compare.sources import Source
from deft_tvm.tuning.lines import Trial, decode
from deft_tvm.tuning.log import TRIALS, log_folders

TIMES = 7
"""Measurements of each row: that of its log, and those of `benchmarks/again.py`."""

SHIPPED = Path(__file__).parents[1] / "logs" / "amd-epyc-avx512bf16-2c"


def test_a_log_beside_itself_measured_again_raises_few_false_alarms(tmp_path: Path) -> None:
    """100 comparisons of ten rows that were measured seven times, with nothing changed: each side
    gets as many of all passes as one of them had, and draws their rounds again."""
    alarms = [alarmed(*chosen, tmp_path) for chosen in redrawn(100)]
    assert sum(alarms) <= 5


def test_a_planted_change_is_found_among_rows_as_they_were_measured(tmp_path: Path) -> None:
    """Of ten rows one is 20 % slower, in whatever hours its passes come from."""
    found = []
    for before, after, rng in redrawn(100):
        place = int(rng.integers(len(after)))
        slow = msgspec.structs.replace(
            after[place], latency_us=tuple(1.2 * us for us in after[place].latency_us)
        )
        rows = comparison(before, [*after[:place], slow, *after[place + 1 :]], tmp_path).rows
        found.append(rows[place].verdict is Verdict.SLOWER)
    assert sum(found) >= 90


def redrawn(times: int) -> Iterator[tuple[list[Trial], list[Trial], np.random.Generator]]:
    """Ten rows of this device's logs, with other passes each time."""
    lines = (SHIPPED / "benchmarks" / "again.jsonl").read_bytes().splitlines()
    measured = [line for line in map(decode, lines) if isinstance(line, Trial)]
    for folder in log_folders(SHIPPED):
        measured += [t.best for t in Source.read(folder).tuned.values() if t.best is not None]
    by_row: defaultdict[tuple[str, ...], list[Trial]] = defaultdict(list)
    for trial in measured:
        if trial.status == "ok" and trial.final:
            by_row[(trial.spec, *trial.subject)].append(trial)
    rows = [row for row in by_row.values() if len(row) == TIMES]
    assert len(rows) >= 10
    rng = np.random.default_rng(0)
    for _ in range(times):
        places = rng.permutation(len(rows))[:10]
        pairs = [_drawn(rows[place], rng) for place in places]
        yield [one for one, _ in pairs], [other for _, other in pairs], rng


def alarmed(before: list[Trial], after: list[Trial], _: object, folder: Path) -> bool:
    """Whether any row is called faster or slower."""
    return bool(comparison(before, after, folder).having(Verdict.SLOWER, Verdict.FASTER))


def comparison(before: list[Trial], after: list[Trial], folder: Path) -> Comparison:
    """Of two logs with these lines, one row each."""
    sides = []
    for letter, trials in (("a", before), ("b", after)):
        path = folder / letter / TRIALS
        path.parent.mkdir(exist_ok=True)
        lines = [
            msgspec.structs.replace(t, trial=n, kernel=f"row{n}", spec=str(SPEC))
            for n, t in enumerate(trials)
        ]
        path.write_bytes(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
        sides.append(Source.read(path.parent))
    return compare(*sides)


def _drawn(trials: list[Trial], rng: np.random.Generator) -> tuple[Trial, Trial]:
    """Two measurements of some of these passes each, whose rounds are drawn with replacement."""
    passes = [
        (trial, end - length, end)
        for trial in trials
        for length, end in zip(trial.passes, np.cumsum(trial.passes), strict=True)
    ]
    order, count = rng.permutation(len(passes)), len(trials[0].passes)
    one, other = ([passes[number] for number in order[side * count :][:count]] for side in range(2))
    return _measured(one, rng), _measured(other, rng)


def _measured(passes: list[tuple[Trial, int, int]], rng: np.random.Generator) -> Trial:
    chosen = [(trial, rng.integers(begin, end, end - begin)) for trial, begin, end in passes]

    def pick(values: Callable[[Trial], tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(values(trial)[number] for trial, numbers in chosen for number in numbers)

    return msgspec.structs.replace(
        passes[0][0],
        passes=tuple(len(numbers) for _, numbers in chosen),
        latency_us=pick(lambda trial: trial.latency_us),
        anchor_us=pick(lambda trial: trial.anchor_us),
        probe_us={
            name: pick(lambda trial, name=name: trial.probe_us[name])
            for name in passes[0][0].probe_us
        },
    )

"""SIGKILL at random moments: nothing that was acknowledged is lost, no half is ever read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from kills import kill_while, tuning_rounds
from test_log import SPEC as LOG_SPEC
from test_log import trial
from toy_artifact import manifest_for

from deft_tvm.manifest import MODULE, file_sha256, read_manifest, write_artifact
from deft_tvm.tuning.log import TuningLog
from deft_tvm.tuning.merge import merge


def test_tuning_on_a_fake_runner_is_killed_45_times(tmp_path: Path) -> None:
    for root in range(3):
        found = tuning_rounds(tmp_path / str(root), 15, real=False, seed=root)
        assert found["killed"] >= 12
        assert found["damaged lines"] <= found["killed"]


def test_real_tuning_is_killed_5_times_and_goes_on(tmp_path: Path) -> None:
    found = tuning_rounds(tmp_path, 5, real=True)
    assert found["killed"] == 5 and found["trials"] >= 5


def build(say: Callable[[int], None], directory: str, modules: tuple[str, str]) -> None:
    """Replace an artifact over and over by one of another size."""
    for number in count():
        write_artifact(directory, manifest_for(created=str(number)), modules[number % 2])
        say(number)


def test_building_is_killed(tmp_path: Path) -> None:
    directory, modules = tmp_path / "artifact", (tmp_path / "short", tmp_path / "long")
    modules[0].write_bytes(b"short")
    modules[1].write_bytes(b"long" * 500_000)
    for delay in range(10):
        killed = kill_while(
            build, str(directory), tuple(map(str, modules)), after=3, delay=delay / 100
        )
        assert killed.at_work
        manifest = read_manifest(directory)
        assert int(manifest.created) >= max(killed.messages)
        assert file_sha256(directory / MODULE) == manifest.sha256


def join(say: Callable[[int], None], sources: tuple[str, ...], into: str) -> None:
    """Merge one log after the other."""
    for number, source in enumerate(sources):
        merge([source], into)
        say(number)


def test_merging_is_killed(tmp_path: Path) -> None:
    sources = tuple(str(tmp_path / str(number)) for number in range(40))
    for number, source in enumerate(sources):
        for line in range(20):
            TuningLog(source).append(trial(line, run=str(number)))
    into = tmp_path / "all"
    log = TuningLog(into / trial().device / LOG_SPEC.slug)
    for delay in range(10):
        killed = kill_while(join, sources, str(into), after=delay, delay=delay / 200)
        reading = log.read()
        assert reading.skipped == 0
        assert len({t.run for t in reading}) > max(killed.messages, default=-1)
        assert len(reading) % 20 == 0, "a merge is there as a whole or not at all"
    merge(sources, into)
    assert len(log.read()) == 40 * 20
    assert [path.name for path in log.directory.iterdir() if path.name.startswith(".trials")] == []

"""Full disks and folders that cannot be written: one sentence, and what was there stays."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tuning_run
from comparable import SPEC, run_line, trial_line
from toy_artifact import manifest_for

from deft_tvm.cli import main
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError, LogError
from deft_tvm.files import write_whole
from deft_tvm.manifest import MODULE, read_manifest, write_artifact
from deft_tvm.tuning.database import FILES, Database
from deft_tvm.tuning.log import TuningLog
from deft_tvm.tuning.merge import merge
from deft_tvm.tuning.probe import write_profile

NOBODY = 65534


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes within: what fits is written first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that can be read and not written, also by root, who becomes nobody for a while."""
    folder = Path(tempfile.mkdtemp())
    (folder / "inside").mkdir()
    for path in (folder, folder / "inside"):
        path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield folder / "inside"
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("fits", [0, 1, 100])
def test_a_line_is_in_the_log_as_a_whole_or_an_error(tmp_path: Path, fits: int) -> None:
    log = TuningLog(tmp_path)
    log.append(trial_line(0, "merge"))
    before = log.path.read_bytes()
    with room_for(len(before) + fits), pytest.raises(LogError) as refused:
        log.append(trial_line(1, "merge"))
    assert str(refused.value).startswith(f"{log.path} cannot be written: ")
    assert "the same command goes on from there" in str(refused.value)
    assert log.path.read_bytes() == before
    log.append(trial_line(1, "merge"))
    assert len(log.read()) == 2 and log.read().skipped == 0


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with room_for(100), pytest.raises(OSError):
        write_whole(path, b"new" * 100)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_a_merge_without_room_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    source, target = TuningLog(tmp_path / "one"), tmp_path / "all"
    source.append(run_line())
    source.append(trial_line(0, "merge"))
    (first,) = merge([source.directory], target)
    before = first.log.path.read_bytes()
    source.append(trial_line(1, "merge"))
    with room_for(len(before) + 10), pytest.raises(OSError):
        merge([source.directory], target)
    assert first.log.path.read_bytes() == before


def test_a_tuning_goes_on_where_its_database_had_no_room(tmp_path: Path) -> None:
    """For a workload, for a new record, and for adding it to the others; the log had some."""

    def refused(room: int) -> None:
        with room_for(room), pytest.raises(LogError) as ended:
            tuning_run.run(str(tmp_path), 4)
        told = str(ended.value)
        assert told.startswith(f"MetaSchedule's database in {log.directory} cannot be written: ")
        assert told.endswith("in the log beside it, and the same command goes on from there")

    log = TuningLog(tmp_path / DeviceProfile.detect().slug / tuning_run.SPEC.slug)
    refused(100_000)
    tuning_run.run(str(tmp_path), 2)
    kept = {name: (log.directory / name).read_bytes() for name in FILES}
    before = log.read().trials
    refused(log.path.stat().st_size + 4_000)
    assert log.read().trials[:-1] == before, "the trial is not lost"
    refused(len(kept[FILES[1]]) + 100)
    assert {name: (log.directory / name).read_bytes() for name in FILES} == kept
    again = tuning_run.run(str(tmp_path), 4)
    searched = [trial.decision for trial in log.read() if not trial.final]
    assert again.new_trials == 1 and len(Database(log.directory)) == len(searched) == 4


def test_an_artifact_without_room_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    module, directory = tmp_path / "module", tmp_path / "artifact"
    module.write_bytes(b"old")
    write_artifact(directory, manifest_for(created="old"), module)
    module.write_bytes(b"new" * 100_000)
    with room_for(10_000), pytest.raises(ArtifactError, match="cannot be written: File too large"):
        write_artifact(directory, manifest_for(created="new"), module)
    assert (directory / MODULE).read_bytes() == b"old"
    assert read_manifest(directory).created == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "module"]


def test_folders_that_cannot_be_written_are_named(read_only: Path) -> None:
    for log in (TuningLog(read_only), TuningLog(read_only / "new")):
        with pytest.raises(LogError, match=r"inside.* cannot be written: Permission denied"):
            log.append(trial_line(0, "merge"))
        with (
            pytest.raises(LogError, match=r"cannot be written: Permission denied"),
            log.only_writer(),
        ):
            pass
    with pytest.raises(ArtifactError, match=r"cannot be written: .*Permission denied"):
        write_artifact(read_only / "new", manifest_for(), __file__)
    with pytest.raises(OSError, match="Permission denied"):
        write_profile(DeviceProfile.nominal(), read_only)


def test_tune_refuses_a_folder_of_logs_before_it_measures_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEFT_TVM_LOGS", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("deft_tvm.tuning.probe.probe", None)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--spec", str(SPEC)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert told.startswith(f"deft-tvm: {tmp_path / 'file'}")
    assert told.endswith("cannot be written: Not a directory; expected a folder that can")


def test_what_cannot_be_written_is_told_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "page.html"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(path, b"new")
    assert caught.value.filename == str(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught_again:
        write_whole(tmp_path / "folder", b"new")
    assert caught_again.value.filename == str(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]

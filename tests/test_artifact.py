from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from toy_artifact import HERE, OTHER, SPEC, manifest_for

from deft_tvm import artifact, manifest
from deft_tvm.artifact import Artifact
from deft_tvm.errors import ArtifactError
from deft_tvm.manifest import KERNEL_ABI, Kernel, write_artifact
from deft_tvm.spec import TileShape


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_load_and_run(directory: Path) -> None:
    loaded = Artifact.load(directory, HERE, SPEC)
    assert loaded.spec == SPEC
    assert loaded.tiles == (TileShape(64, 32, "float32"),)
    source = torch.randn(100, 64)
    result = torch.empty_like(source)
    loaded.partial(0)(source, result)
    assert torch.equal(result, source * 2)
    numbers = torch.zeros(5, dtype=torch.int32)
    loaded.merge(numbers)
    assert numbers.tolist() == [1] * 5


def test_a_module_is_loaded_once(directory: Path) -> None:
    assert Artifact.load(directory).module is Artifact.load(str(directory)).module


def test_the_manifest_comes_back(directory: Path) -> None:
    read = manifest.read_manifest(directory)
    assert read.sha256 == manifest.file_sha256(directory / "module.so")
    assert msgspec.structs.replace(read, sha256="") == manifest_for()
    assert (read.lse_base, read.tuned) == ("e", False)
    assert {"torch", "tvm_ffi", "tvm"} <= set(read.versions)


def test_a_replaced_module_is_loaded_again(
    directory: Path, module_file: Path, tmp_path: Path
) -> None:
    negative = torch.tensor([-1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="negative element"):
        Artifact.load(directory).merge(negative)
    changed = tmp_path / "changed.so"
    changed.write_bytes(module_file.read_bytes().replace(b"negative element", b"another element!"))
    write_artifact(directory, manifest_for(), changed)
    with pytest.raises(RuntimeError, match="another element!"):
        Artifact.load(directory).merge(negative)


@pytest.mark.parametrize("after", ["read_manifest", "check_whole"])
def test_a_module_that_is_replaced_while_it_is_loaded_is_the_new_one(
    directory: Path,
    module_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: str,
) -> None:
    """By another process, after the manifest was read or after the library was."""
    changed = tmp_path / "changed.so"
    changed.write_bytes(module_file.read_bytes().replace(b"negative element", b"another element!"))
    step = getattr(artifact, after)

    def then_replace(*given: Any) -> Any:
        monkeypatch.setattr(artifact, after, step)
        found = step(*given)
        write_artifact(directory, manifest_for(created="new"), changed)
        return found

    monkeypatch.setattr(artifact, after, then_replace)
    loaded = Artifact.load(directory)
    assert loaded.manifest == manifest.read_manifest(directory) and loaded.manifest.created == "new"
    with pytest.raises(RuntimeError, match="another element!"):
        loaded.merge(torch.tensor([-1], dtype=torch.int32))
    assert Artifact.load(directory).module is loaded.module


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema is 2; expected 1 or older: update deft_tvm"),
        ({"kernel_abi": 1}, f"kernel_abi is 1; expected {KERNEL_ABI}: build the module again"),
        ({"kernel_abi": "x"}, r"Expected `int`, got `str` - at `\$.kernel_abi`"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"lse_base": "2"}, r"Invalid enum value '2' - at `\$.lse_base`"),
        ({"needs": ["moon"]}, r"Invalid enum value 'moon' - at `\$.needs\[0\]`"),
        ({"kind": "cuda-cubin"}, "kind is 'cuda-cubin'; expected a module for cpu"),
        (
            {"required_features": ["avx2", "amx-complex"]},
            r"required_features is \['amx-complex'\]; expected only what .* has",
        ),
        ({"spec": str(OTHER)}, "spec is 'gqa:.*d=128.*'; expected gqa:.*d=64"),
        ({"sha256": "0" * 64}, "sha256 is .*; expected '0{64}': the file is damaged or truncated"),
    ],
)
def test_what_does_not_fit_is_refused(directory: Path, fields: dict, message: str) -> None:
    profile = msgspec.structs.replace(HERE, features=(*HERE.features, "avx2"))
    edit(directory, lambda old: old.update(fields))
    with pytest.raises(ArtifactError, match=message) as refusal:
        Artifact.load(directory, profile, SPEC)
    assert str(directory) in str(refusal.value)


def test_damaged_files_are_refused(directory: Path) -> None:
    module = directory / "module.so"
    os.truncate(module, module.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=r"module\.so: sha256 is .* damaged or truncated"):
        Artifact.load(directory)
    module.unlink()
    with pytest.raises(ArtifactError, match=r"module\.so: No such file .*; expected a module"):
        Artifact.load(directory)
    os.truncate(directory / "manifest.json", 100)
    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read: .*truncated"):
        Artifact.load(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"No such file .*; expected a manifest"):
        Artifact.load(directory)


def test_a_function_that_is_not_there_is_refused(tmp_path: Path, module_file: Path) -> None:
    missing = manifest_for(merge=Kernel(function="absent", decision={}))
    loaded = Artifact.load(write_artifact(tmp_path / "a", missing, module_file))
    with pytest.raises(ArtifactError, match="has no function 'absent'"):
        _ = loaded.merge


def test_an_artifact_is_replaced_whole(tmp_path: Path, not_a_module: Path) -> None:
    target = tmp_path / "out" / "a"
    write_artifact(target, manifest_for(created="1"), not_a_module)
    write_artifact(target, manifest_for(created="2"), not_a_module)
    assert manifest.read_manifest(target).created == "2"
    assert sorted(os.listdir(target)) == ["manifest.json", "module.so"]
    assert os.listdir(target.parent) == ["a"]


def test_several_artifacts_are_written_to_one_new_folder_at_once(
    tmp_path: Path, not_a_module: Path
) -> None:
    together = threading.Barrier(4)

    def write(folder: Path) -> Path:
        together.wait()
        return write_artifact(folder, manifest_for(), not_a_module)

    with ThreadPoolExecutor(together.parties) as pool:
        for number in range(25):
            folder = tmp_path / "out" / str(number)
            assert set(pool.map(write, [folder] * together.parties)) == {folder}
            assert sorted(os.listdir(folder)) == ["manifest.json", "module.so"]
    assert len(os.listdir(tmp_path / "out")) == 25, "nothing is left behind"


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path, not_a_module: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    write_artifact(target, manifest_for(), not_a_module)  # an empty folder is
    (target / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"a has 'notes\.txt' in it; expected a new folder, or"):
        write_artifact(target, manifest_for(), not_a_module)
    with pytest.raises(ArtifactError, match=r"notes\.txt: Not a directory; expected a folder"):
        write_artifact(target / "notes.txt", manifest_for(), not_a_module)
    assert sorted(os.listdir(target)) == ["manifest.json", "module.so", "notes.txt"]


def test_a_failed_write_leaves_the_old_artifact(tmp_path: Path, not_a_module: Path) -> None:
    target = write_artifact(tmp_path / "out" / "a", manifest_for(created="1"), not_a_module)
    with pytest.raises(ArtifactError, match=r"a cannot be written: No such file or directory; wh"):
        write_artifact(target, manifest_for(created="2"), tmp_path / "absent.so")
    assert manifest.read_manifest(target).created == "1"
    assert os.listdir(target.parent) == ["a"]

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import deft_tvm
from deft_tvm import artifact, env, manifest
from deft_tvm.artifact import Artifact, find, search_path
from deft_tvm.device import DeviceProfile, required_features
from deft_tvm.errors import ArtifactError, CompilerMissing, InputError
from deft_tvm.manifest import Kernel, Manifest, TileKernel, write_artifact
from deft_tvm.spec import AttentionSpec, TileShape

SPEC = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
OTHER = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=128)
HERE = DeviceProfile.detect()


def manifest_for(**fields: Any) -> Manifest:
    tile = TileKernel(
        function="doubled", decision={"tile": 4}, lane_rows=64, kv_tile=32, operand="float32"
    )
    default = {
        "spec": str(SPEC),
        "tiles": (tile,),
        "merge": Kernel(function="counted", decision={}),
        "target": HERE.target(),
        "required_features": required_features(HERE.target()),
        "device": HERE.slug,
        "kind": "cpu",
        "versions": manifest.installed_versions(),
        "created": "2026-11-21T12:00:00",
        "needs": ("torch_pool",),
    }
    return Manifest(**default | fields)


@pytest.fixture(scope="module")
def module_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tvm", reason="apache-tvm compiles the toy module")
    import toy_module

    return toy_module.export(tmp_path_factory.mktemp("toy"), HERE.target())


@pytest.fixture
def directory(tmp_path: Path, module_file: Path) -> Path:
    return write_artifact(tmp_path / "artifact", manifest_for(), module_file)


@pytest.fixture
def not_a_module(tmp_path: Path) -> Path:
    """Enough for tests that look at manifests and load nothing."""
    path = tmp_path / "nothing.so"
    path.write_bytes(b"nothing")
    return path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache" / "modules"
    monkeypatch.setattr(manifest, "cache_root", lambda: root)
    monkeypatch.setattr(artifact, "cache_root", lambda: root)
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    return root


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Path] | None], None]:
    """Put a function in the place of ``build.build_default``; None: there is no compiler."""

    def install(build_default: Callable[..., Path] | None) -> None:
        fake = types.SimpleNamespace(build_default=build_default) if build_default else None
        monkeypatch.setitem(sys.modules, "deft_tvm.build", fake)
        monkeypatch.delattr(deft_tvm, "build", raising=False)

    return install


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


def test_the_manifest_comes_back_with_its_sha256(directory: Path) -> None:
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema is 2; expected 1 or older: update deft_tvm"),
        ({"kernel_abi": 2}, "kernel_abi is 2; expected 1: build the module again"),
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
    with pytest.raises(ArtifactError, match="module.so: sha256 is .* damaged or truncated"):
        Artifact.load(directory)
    module.unlink()
    with pytest.raises(ArtifactError, match="module.so: No such file .*; expected a module"):
        Artifact.load(directory)
    os.truncate(directory / "manifest.json", 100)
    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read: .*truncated"):
        Artifact.load(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="No such file .*; expected a manifest"):
        Artifact.load(directory)


def test_a_function_that_is_not_there_is_refused(tmp_path: Path, module_file: Path) -> None:
    missing = manifest_for(merge=Kernel(function="absent", decision={}))
    loaded = Artifact.load(write_artifact(tmp_path / "a", missing, module_file))
    with pytest.raises(ArtifactError, match="has no function 'absent'"):
        _ = loaded.merge


def test_an_artifact_is_replaced_whole(tmp_path: Path, not_a_module: Path) -> None:
    target = tmp_path / "out" / "a"
    trials = tmp_path / "log.jsonl"
    trials.write_text("{}\n")
    write_artifact(target, manifest_for(created="1"), not_a_module, trials)
    write_artifact(target, manifest_for(created="2"), not_a_module)
    assert manifest.read_manifest(target).created == "2"
    assert sorted(os.listdir(target)) == ["manifest.json", "module.so"]
    assert os.listdir(target.parent) == ["a"]


def test_a_failed_write_leaves_the_old_artifact(tmp_path: Path, not_a_module: Path) -> None:
    target = write_artifact(tmp_path / "out" / "a", manifest_for(created="1"), not_a_module)
    with pytest.raises(FileNotFoundError):
        write_artifact(target, manifest_for(created="2"), tmp_path / "absent.so")
    assert manifest.read_manifest(target).created == "1"
    assert os.listdir(target.parent) == ["a"]


def best(tmp_path: Path, module: Path, **candidates: dict[str, Any]) -> str | None:
    """Name of the best of some artifacts that differ in a few fields."""
    for name, fields in candidates.items():
        write_artifact(tmp_path / "many" / name, manifest_for(**fields), module)
    found = artifact._best(SPEC, HERE, tmp_path / "many")
    return found and found.name


def tuned(merge: str = "counted") -> dict[str, Any]:
    return {"merge": Kernel(function=merge, decision={}, tuned_from="7, 2026-11-20, here")}


def test_this_device_then_tuned_then_newest(tmp_path: Path, not_a_module: Path) -> None:
    near = {"device": "another-of-the-kind"}
    one = {"near": near | tuned() | {"created": "2026-12-01"}}
    assert best(tmp_path, not_a_module, **one) == "near"
    assert best(tmp_path, not_a_module, own={"created": "2026-01-01"}) == "own"
    assert best(tmp_path, not_a_module, newer={"created": "2026-02-01"}) == "newer"
    assert best(tmp_path, not_a_module, tuned=tuned() | {"created": "2025-01-01"}) == "tuned"


def test_modules_that_do_not_fit_are_passed_over(tmp_path: Path, not_a_module: Path) -> None:
    unfit = {
        "other": {"spec": str(OTHER)},
        "gpu": {"kind": "cuda-cubin"},
        "newer": {"required_features": ("avx99",)},
    }
    assert best(tmp_path, not_a_module, **unfit) is None


def test_untuned_leaves_tuned_modules_out(
    tmp_path: Path, not_a_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFT_TVM_UNTUNED", "1")
    assert best(tmp_path, not_a_module, tuned=tuned()) is None
    assert best(tmp_path, not_a_module, plain={}) == "plain"


def test_folders_that_the_user_names_go_first(
    tmp_path: Path, not_a_module: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = write_artifact(manifest.cache_directory(SPEC, HERE), manifest_for(), not_a_module)
    assert cached.is_relative_to(empty_cache)
    assert artifact._best(SPEC, HERE, None) == cached
    old = manifest_for(device="another", created="2020-01-01")
    named = write_artifact(tmp_path / "named" / "a", old, not_a_module)
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", f"/nowhere{os.pathsep}{named.parent}")
    assert artifact._best(SPEC, HERE, None) == named
    assert search_path("/mine") == [Path("/mine"), Path("/nowhere"), named.parent, empty_cache]


def test_packages_may_ship_modules(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(name: str, load: Callable[[], object]) -> types.SimpleNamespace:
        return types.SimpleNamespace(value=name, load=load)

    def broken() -> None:
        raise ImportError("no such package")

    entries = [entry("a", lambda: tmp_path), entry("b", lambda: lambda: "/b"), entry("c", broken)]
    monkeypatch.setattr(artifact.metadata, "entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match="entry point 'c' of deft_tvm.modules: no such package"):
        assert search_path() == [tmp_path, Path("/b"), empty_cache]


def test_find_loads_and_says_where_from(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(SPEC, HERE, directory).directory == directory
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DEFT_TVM_DEBUG", "1")
    find(SPEC, path=directory.parent)
    assert f"deft_tvm: {directory}: doubled: default" in capsys.readouterr().err


def test_find_builds_and_caches_the_default_once(module_file: Path, build: Callable) -> None:
    built = []

    def build_default(spec: AttentionSpec, device: DeviceProfile) -> Path:
        built.append((spec, device))
        target = manifest.cache_directory(spec, device)
        return write_artifact(target, manifest_for(), module_file)

    build(build_default)
    assert find(SPEC, HERE).manifest.device == HERE.slug
    assert find(SPEC, HERE).directory == manifest.cache_directory(SPEC, HERE)
    assert built == [(SPEC, HERE)]


def test_no_module_and_no_compiler(tmp_path: Path, not_a_module: Path, build: Callable) -> None:
    build(None)
    unfit = manifest_for(required_features=("avx99",))
    write_artifact(tmp_path / "many" / "unfit", unfit, not_a_module)
    with pytest.raises(CompilerMissing) as refusal:
        find(SPEC, HERE, tmp_path / "many")
    text = str(refusal.value)
    assert text.startswith(f"no module for spec {SPEC} on {HERE.slug} in {tmp_path / 'many'}, ")
    assert "required_features is ['avx99']; expected only what" in text
    assert "pip install 'deft-tvm[tune]'" in text
    assert f"deft-tvm build --spec {SPEC}" in text
    assert "DEFT_TVM_MODULE_PATH" in text


def test_every_variable_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"DEBUG", "DUMP", "CHECK", "LOGS", "UNTUNED", "MODULE_PATH"}
    assert {variable.name for variable in env.VARIABLES} == {f"DEFT_TVM_{n}" for n in names}
    values = [variable.get() for variable in env.VARIABLES]
    assert values == [0, None, False, None, False, ()]
    for variable, text in zip(env.VARIABLES, ("3", "d", "1", "l", "0", "a:b"), strict=True):
        monkeypatch.setenv(variable.name, text)
    values = [variable.get() for variable in env.VARIABLES]
    assert values == [3, Path("d"), True, Path("l"), False, (Path("a"), Path("b"))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("DEBUG", "6", "DEFT_TVM_DEBUG is '6'; expected a level from 0 to 5"),
        ("DEBUG", "loud", "DEFT_TVM_DEBUG is 'loud'; expected a level from 0 to 5"),
        ("CHECK", "yes", "DEFT_TVM_CHECK is 'yes'; expected 0 or 1"),
    ],
)
def test_a_bad_value_is_refused(
    name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DEFT_TVM_{name}", text)
    with pytest.raises(InputError, match=message):
        getattr(env, name).get()

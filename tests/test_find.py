from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_artifact import HERE, OTHER, SPEC, manifest_for

import deft_tvm
from deft_tvm import artifact, env, manifest
from deft_tvm.artifact import find, search_path
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import CompilerMissing
from deft_tvm.manifest import Kernel, write_artifact
from deft_tvm.spec import AttentionSpec


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


def best(tmp_path: Path, module: Path, **candidates: dict[str, Any]) -> str | None:
    """Name of the best of some artifacts that differ in a few fields."""
    for name, fields in candidates.items():
        write_artifact(tmp_path / "many" / name, manifest_for(**fields), module)
    found = artifact._best(SPEC, HERE, tmp_path / "many")
    return None if found is None else found.name


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
    unfit: dict[str, dict[str, Any]] = {
        "other": {"spec": str(OTHER)},
        "gpu": {"kind": "cuda-cubin"},
        "newer": {"required_features": ("avx99",)},
    }
    assert best(tmp_path, not_a_module, **unfit) is None


def test_an_artifact_that_is_being_written_is_not_seen(tmp_path: Path, not_a_module: Path) -> None:
    assert best(tmp_path, not_a_module, **{".own-x1/new": {}}) is None


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
    assert "pip install '.[tune]'" in text
    assert f"deft-tvm build --spec {SPEC}" in text
    assert "DEFT_TVM_MODULE_PATH" in text

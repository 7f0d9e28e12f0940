from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from toy_artifact import HERE, OTHER, SPEC, manifest_for

import deft_tvm
from deft_tvm import artifact, env, finding, manifest
from deft_tvm.artifact import Artifact, find
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError, CompilerMissing
from deft_tvm.finding import Candidate, candidates, search_path
from deft_tvm.manifest import KERNEL_ABI, Kernel, write_artifact
from deft_tvm.spec import AttentionSpec


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache" / "modules"
    monkeypatch.setattr(manifest, "cache_root", lambda: root)
    monkeypatch.setattr(finding, "cache_root", lambda: root)
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


def candidates_of(tmp_path: Path, module: Path, **fields: dict[str, Any]) -> dict[str, Candidate]:
    """Artifacts that differ in a few fields, by name, and what becomes of them."""
    for name, different in fields.items():
        write_artifact(tmp_path / "many" / name, manifest_for(**different), module)
    return {found.directory.name: found for found in candidates(SPEC, HERE, tmp_path / "many")}


def best(tmp_path: Path, module: Path, **fields: dict[str, Any]) -> str | None:
    """Name of the one that is taken."""
    names = [n for n, c in candidates_of(tmp_path, module, **fields).items() if c.taken]
    assert len(names) <= 1
    return names[0] if names else None


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


def test_every_module_is_told_why(
    tmp_path: Path, not_a_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, dict[str, Any]] = {
        "best": tuned() | {"created": "2026-02-02"},
        "old": tuned() | {"created": "2026-01-01"},
        "plain": {"created": "2026-03-03"},
        "foreign": tuned() | {"device": "another", "created": "2026-03-03"},
        "other": {"spec": str(OTHER)},
        "before": {"kernel_abi": 1},
        "newer": {"required_features": ("avx99",)},
    }
    found = candidates_of(tmp_path, not_a_module, **fields)
    assert {name: candidate.reason for name, candidate in found.items()} == {
        "best": "the newest",
        "old": "older",
        "plain": "default decisions, and there is a tuned one",
        "foreign": "built for another device",
        "other": f"manifest.json: spec is {str(OTHER)!r}; expected {SPEC}",
        "before": f"manifest.json: kernel_abi is 1; expected {KERNEL_ABI}: build the module again",
        "newer": "manifest.json: required_features is ['avx99']; expected only what "
        f"{HERE.slug} has",
    }
    assert [name for name, candidate in found.items() if candidate.taken] == ["best"]
    monkeypatch.setenv("DEFT_TVM_UNTUNED", "1")
    found = candidates_of(tmp_path, not_a_module)
    assert found["best"].reason == "tuned, and DEFT_TVM_UNTUNED is set"
    assert (found["plain"].taken, found["plain"].reason) == (True, "the only one that fits")


def test_the_taken_one_is_told_what_it_has_before_the_next(
    tmp_path: Path, not_a_module: Path, empty_cache: Path
) -> None:
    def why(**fields: dict[str, Any]) -> list[str]:
        found = candidates_of(tmp_path, not_a_module, **fields).values()
        return [candidate.reason for candidate in found if candidate.taken]

    assert why(a={"device": "another"}) == ["the only one that fits"]
    write_artifact(manifest.cache_directory(SPEC, HERE), manifest_for(**tuned()), not_a_module)
    assert why() == ["in a folder that the user named"]
    assert why(b={}) == ["built for this device"]
    assert why(c=tuned()) == ["tuned"]
    assert why(d=tuned()) == ["the last by name of those as good"]


def test_a_module_that_two_places_name_is_one(
    tmp_path: Path, not_a_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", str(tmp_path / "many" / "a"))
    found = candidates_of(tmp_path, not_a_module, a={})
    assert [(c.place.origin, c.reason) for c in found.values()] == [
        ("path", "the only one that fits")
    ]


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
    assert [c.directory for c in candidates(SPEC, HERE) if c.taken] == [cached]
    old = manifest_for(device="another", created="2020-01-01")
    named = write_artifact(tmp_path / "named" / "a", old, not_a_module)
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", f"/nowhere{os.pathsep}{named.parent}")
    assert [c.directory for c in candidates(SPEC, HERE) if c.taken] == [named]
    assert [(place.folder, place.origin) for place in search_path("/mine")] == [
        (Path("/mine"), "path"),
        (Path("/nowhere"), "DEFT_TVM_MODULE_PATH"),
        (named.parent, "DEFT_TVM_MODULE_PATH"),
        (empty_cache, "the user's cache"),
    ]


def test_packages_may_ship_modules(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(name: str, load: Callable[[], object]) -> types.SimpleNamespace:
        return types.SimpleNamespace(value=name, load=load)

    def broken() -> None:
        raise ImportError("no such package")

    entries = [entry("a", lambda: tmp_path), entry("b", lambda: lambda: "/b"), entry("c", broken)]
    monkeypatch.setattr(finding.metadata, "entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match="entry point 'c' of deft_tvm.modules: no such package"):
        assert [place.folder for place in search_path()] == [tmp_path, Path("/b"), empty_cache]


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


def test_a_damaged_best_module_is_refused_and_not_passed_over(
    tmp_path: Path, directory: Path, not_a_module: Path
) -> None:
    many = directory.parent / "many"
    write_artifact(many / "good", manifest_for(created="2026-01-01"), directory / "module.so")
    broken = write_artifact(many / "broken", manifest_for(created="2026-02-02"), not_a_module)
    with open(broken / "module.so", "ab") as file:
        file.write(b"!")
    with pytest.raises(ArtifactError, match=r"damaged or truncated") as refusal:
        find(SPEC, HERE, many)
    assert str(refusal.value).startswith(f"{broken / 'module.so'}: sha256 is ")
    again = f"`deft-tvm build --spec {SPEC} --out {broken}` makes it again"
    assert str(refusal.value).endswith(again)
    damage = {c.directory.name: c.damage() for c in candidates(SPEC, HERE, many)}
    assert damage == {"good": "", "broken": str(refusal.value)}


def test_nothing_runs_that_this_machine_lacks_instructions_for(
    directory: Path, not_a_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = msgspec.structs.replace(HERE, features=(*HERE.features, "avx99"))
    monkeypatch.setattr(artifact.tvm_ffi, "load_module", None)
    write_artifact(directory, manifest_for(required_features=("avx99",)), not_a_module)
    for refused in (
        lambda: find(SPEC, elsewhere, directory),
        lambda: Artifact.load(directory, elsewhere),
        lambda: Artifact.load(directory, HERE),
        lambda: Artifact.load(directory),
    ):
        with pytest.raises(ArtifactError, match=r"required_features is \['avx99'\]; expected only"):
            refused()


def test_no_module_and_no_compiler(tmp_path: Path, not_a_module: Path, build: Callable) -> None:
    build(None)
    unfit = manifest_for(required_features=("avx99",))
    write_artifact(tmp_path / "many" / "unfit", unfit, not_a_module)
    write_artifact(tmp_path / "many" / "unasked", manifest_for(spec=str(OTHER)), not_a_module)
    with pytest.raises(CompilerMissing) as refusal:
        find(SPEC, HERE, tmp_path / "many")
    text = str(refusal.value)
    assert text.startswith(f"no module for spec {SPEC} on {HERE.slug} in {tmp_path / 'many'}, ")
    unfit_folder = tmp_path / "many" / "unfit"
    assert f"{unfit_folder}: manifest.json: required_features is ['avx99']; expected only" in text
    assert "unasked" not in text
    assert "pip install '.[tune]'" in text
    assert f"deft-tvm build --spec {SPEC}" in text
    assert "DEFT_TVM_MODULE_PATH" in text


def test_defaults_that_are_asked_for_take_no_tuned_module_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deft_tvm import build as building

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[Path] = []
    monkeypatch.setattr(building, "build", lambda spec, device, out: made.append(out) or out)
    device = DeviceProfile.detect()
    for asked in ("0", "1"):
        monkeypatch.setenv("DEFT_TVM_UNTUNED", asked)
        building.build_default(SPEC, device)
    tuned, untuned = made
    assert tuned == manifest.cache_directory(SPEC, device)
    assert untuned.parent == tuned.parent and untuned.name == f"{tuned.name}-untuned"

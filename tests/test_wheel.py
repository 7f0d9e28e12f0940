"""Modules as a wheel: what is in it, and that deft_tvm finds them where pip has installed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from built import SMALL, artifact
from toy_artifact import HERE, OTHER, SPEC, manifest_for

from deft_tvm.artifact import Artifact
from deft_tvm.errors import ArtifactError
from deft_tvm.manifest import KERNEL_ABI, write_artifact

pytest.importorskip("hatchling", reason="hatchling packs wheels")
from deft_tvm.wheel import write_wheel

ROOT = Path(__file__).parents[1]
PACKAGE = f"deft_tvm_modules_{HERE.slug.replace('-', '_')}"
WITHOUT_COMPILER = "import sys; sys.modules['tvm'] = None\n"


def install(wheel: Path, target: Path) -> Path:
    """Into `target`, as pip does it; the folder of the package's modules."""
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    command = (sys.executable, "-m", "pip", "install", *offline, "--target", target, wheel)
    subprocess.run(command, check=True, timeout=60)
    return target / PACKAGE / HERE.slug


def run(program: str, installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that sees the folder `installed`, and neither the user's modules nor a compiler."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DEFT_TVM_")},
        "PYTHONPATH": os.pathsep.join((str(installed), str(ROOT))),
        "XDG_CACHE_HOME": str(installed / "no-cache"),
    }
    command = (sys.executable, "-c", WITHOUT_COMPILER + program, *arguments)
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=installed, timeout=120
    )


FIND = """
from deft_tvm.artifact import find
from deft_tvm.errors import DeftError
from deft_tvm.spec import AttentionSpec
try:
    print(find(AttentionSpec.parse(sys.argv[1])).directory)
except DeftError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_find_takes_the_module_of_an_installed_wheel(tmp_path: Path, directory: Path) -> None:
    target = tmp_path / "site"
    modules = install(write_wheel([directory], tmp_path / "dist"), target)
    found = run(FIND, target, str(SPEC))
    assert found.stdout == f"{modules / SPEC.slug}\n", found.stderr
    os.truncate(modules / SPEC.slug / "module.so", 1000)
    found = run(FIND, target, str(SPEC))
    assert found.stdout.startswith(f"ArtifactError: {modules / SPEC.slug / 'module.so'}: sha256 is")


def test_a_module_for_another_processor_is_refused_though_it_is_installed(
    tmp_path: Path, directory: Path
) -> None:
    demanding = manifest_for(required_features=("avx99",))
    write_artifact(tmp_path / "demanding", demanding, directory / "module.so")
    target = tmp_path / "site"
    modules = install(write_wheel([tmp_path / "demanding"], tmp_path / "dist"), target)
    found = run(FIND, target, str(SPEC))
    assert found.stdout.startswith("CompilerMissing: no module for spec"), found.stderr
    refusal = f"required_features is ['avx99']; expected only what {HERE.slug} has"
    assert f"(passed over: {modules / SPEC.slug}: manifest.json: {refusal})" in found.stdout
    with pytest.raises(ArtifactError, match=r"required_features is \['avx99'\]"):
        Artifact.load(modules / SPEC.slug)


def test_a_real_module_runs_from_a_wheel(tmp_path: Path) -> None:
    target = tmp_path / "site"
    modules = install(write_wheel([artifact(SMALL)], tmp_path / "dist"), target)
    check = "from deft_tvm.cli import main; main(sys.argv[1:])"
    workload = "few_shot:prompt=90,branches=5,tokens=7"
    ran = run(check, target, "check", workload, "--spec", str(SMALL), "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["exact"], told["module"]) == (True, str(modules / SMALL.slug))


def test_what_a_wheel_says_of_itself(tmp_path: Path, not_a_module: Path) -> None:
    one = write_artifact(
        tmp_path / "one", manifest_for(created="2026-11-21T12:00:00"), not_a_module
    )
    newer = manifest_for(spec=str(OTHER), created="2026-11-22T01:02:03")
    two = write_artifact(tmp_path / "two", newer, not_a_module)
    wheel = write_wheel([one, two], tmp_path / "dist")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f".post20261122010203-py3-none-{platform}.whl")
    assert os.listdir(wheel.parent) == [wheel.name]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (info,) = (tmp_path / "site").glob("*.dist-info")
    told = metadata.Distribution.at(info)
    assert (told.name, told.read_text("top_level.txt")) == (PACKAGE, None)
    assert told.metadata["Summary"].endswith(f"for {HERE.slug}: kernel ABI {KERNEL_ABI}")
    assert [need.partition(">=")[0] for need in told.requires or ()] == ["deft-tvm"]
    assert "Root-Is-Purelib: false" in (told.read_text("WHEEL") or "")
    (entry,) = told.entry_points
    assert (entry.group, entry.value) == ("deft_tvm.modules", f"{PACKAGE}:FOLDER")
    data = {path for path in told.files or () if path.parts[0] == PACKAGE}
    assert {"/".join(path.parts[1:]) for path in data} == {
        "__init__.py",
        *(
            f"{HERE.slug}/{s.slug}/{f}"
            for s in (SPEC, OTHER)
            for f in ("module.so", "manifest.json")
        ),
    }


def test_the_same_modules_make_the_same_bytes(
    tmp_path: Path, not_a_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wheels = []
    for name in ("here", "there"):
        write_artifact(Path(name), manifest_for(), not_a_module)
        os.utime(Path(name, "module.so"), (len(wheels), len(wheels)))
        wheels.append(write_wheel([name], Path("dist", name)))
    here, there = wheels
    assert here.name == there.name
    assert here.read_bytes() == there.read_bytes()


def test_what_is_damaged_or_for_another_device_is_not_packed(
    tmp_path: Path, not_a_module: Path
) -> None:
    good = write_artifact(tmp_path / "good", manifest_for(), not_a_module)
    foreign = write_artifact(tmp_path / "foreign", manifest_for(device="another"), not_a_module)
    with pytest.raises(ArtifactError, match=f"device is 'another'; expected '{HERE.slug}'"):
        write_wheel([good, foreign], tmp_path / "dist")
    (good / "module.so").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"good/module\.so: sha256 is .* damaged"):
        write_wheel([good], tmp_path / "dist")
    assert os.listdir(tmp_path / "dist") == []
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file cannot be written: .*File exists; expected a"):
        write_wheel([good], tmp_path / "file")

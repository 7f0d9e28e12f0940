"""What tests of several files are given: golden files, and artifacts of the toy module.

Golden files are text that users read, kept beside the tests and compared character by character.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from toy_artifact import export, manifest_for

from deft_tvm.manifest import write_artifact

# A deadline of some milliseconds says how busy the machine is, and nothing of the code.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files instead of comparing"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with ``golden/<room>/<test>.txt``, a name that the test gives."""
    room = request.path.stem.removeprefix("test_")
    path = GOLDEN / room / f"{request.node.name.removeprefix('test_')}.txt"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        assert path.exists(), f"{path} is missing; run pytest with --update-golden"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture(scope="module")
def module_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy module, compiled once for the tests of a file."""
    return export(tmp_path_factory)


@pytest.fixture
def directory(tmp_path: Path, module_file: Path) -> Path:
    """A complete artifact of the toy module."""
    return write_artifact(tmp_path / "artifact", manifest_for(), module_file)


@pytest.fixture
def not_a_module(tmp_path: Path) -> Path:
    """Enough for tests that look at manifests and load nothing."""
    path = tmp_path / "nothing.so"
    path.write_bytes(b"nothing")
    return path


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's logs and modules nor those that ship."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "DEFT_TVM_LOGS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("COLUMNS", "80")

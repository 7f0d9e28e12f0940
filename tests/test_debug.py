"""What the debugging variables print and keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from deft_tvm import env
from deft_tvm.build import build
from deft_tvm.debug import tell
from deft_tvm.spec import AttentionSpec, TileShape


def test_a_level_tells_itself_and_all_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.DEBUG.name, "2")
    for level in (1, 2, 3):
        tell(level, "title", lambda level=level: f"level {level}")
    assert capsys.readouterr().err == "deft_tvm: level 1\ndeft_tvm: level 2\n"


def test_nothing_is_made_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.DEBUG.name, raising=False)
    monkeypatch.delenv(env.DUMP.name, raising=False)
    tell(1, "title", lambda: pytest.fail("the text was made"))


def test_a_build_is_kept_as_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(env.DUMP.name, str(tmp_path / "dump"))
    spec = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16)
    build(spec, out=tmp_path / "module", tiles=[TileShape(16, 16, "float32")])
    kept = {file.name[4:]: file.read_text() for file in (tmp_path / "dump").iterdir()}
    assert "score_rows" in kept["partial_r16t16f32-schedule.py"]
    assert "T.vectorized" in kept["partial_r16t16f32-scheduled.py"]
    assert "T.vectorized" not in kept["partial_r16t16f32-as-written.py"]
    assert "vfmadd" in kept["module-source.s"] or "fmla" in kept["module-source.s"]

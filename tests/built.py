"""Real artifacts, each built once a session and then shared by all tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from deft_tvm.device import DeviceProfile
from deft_tvm.spec import AttentionSpec

SMALL = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=4)

folder = tempfile.TemporaryDirectory(prefix="deft-tvm-tests-")


@cache
def artifact(spec: AttentionSpec) -> Path:
    """The folder of a module for `spec` here, with the smallest and the largest tile class."""
    pytest.importorskip("tvm", reason="apache-tvm builds the module")
    from deft_tvm.build import Decisions, build
    from deft_tvm.schedules.tiles import default_tiles

    tiles = default_tiles(spec, "llvm", frozenset(DeviceProfile.detect().features))
    return build(
        spec,
        out=Path(folder.name, spec.slug),
        tiles=sorted({tiles[0], tiles[-1]}, key=lambda tile: tile.lane_rows),
        decisions=Decisions(),
    )

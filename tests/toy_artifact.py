"""Manifests and modules for the tests of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_tvm import manifest
from deft_tvm.device import DeviceProfile, required_features
from deft_tvm.manifest import Kernel, Manifest, TileKernel
from deft_tvm.spec import AttentionSpec

SPEC = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
OTHER = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=128)
HERE = DeviceProfile.detect()


def manifest_for(**fields: Any) -> Manifest:
    tile = TileKernel(
        function="doubled", decision={"tile": 4}, lane_rows=64, kv_tile=32, operand="float32"
    )
    default: dict[str, Any] = {
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


def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy module, compiled for this machine: ``doubled`` and ``counted``."""
    pytest.importorskip("tvm", reason="apache-tvm compiles the toy module")
    import toy_module

    return toy_module.export(tmp_path_factory.mktemp("toy"), HERE.target())

"""A module for a GPU that is not here: what `build` writes for it, and where it is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

import deft_tvm
from deft_tvm.artifact import Artifact
from deft_tvm.build import Decisions, build
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError
from deft_tvm.manifest import MANIFEST, MODULE, file_sha256, read_manifest
from deft_tvm.pytorch import TreeAttention
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")

SPEC = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float16")
GPU = DeviceProfile(
    slug="nvidia-h200-sm90a-132sm",
    name="NVIDIA H200",
    kind="cuda",
    cores=132,
    features=("sm_90", "sm_90a"),
    l2_bytes=50 << 20,
    l3_bytes=0,
    read_bandwidth=2e12,
    matrix_rate={"float32": 5e13, "float16": 8e14, "bfloat16": 8e14},
    launch_seconds=5e-6,
)
OLDER = msgspec.structs.replace(GPU, slug="nvidia-l4-sm89-58sm", features=("sm_80", "sm_89"))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SPEC, GPU, out=tmp_path_factory.mktemp("gpu") / "module", decisions=Decisions())


def test_the_manifest_says_what_the_module_needs(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.spec == str(SPEC)
    assert manifest.device == GPU.slug
    assert manifest.device_kind == "cuda"
    assert manifest.target == GPU.target()
    assert manifest.required_features == ("sm_90a",)
    assert manifest.needs == ("tvm_runtime",)
    assert manifest.sha256 == file_sha256(built / MODULE)
    tiles = default_tiles(SPEC, "cuda", frozenset(GPU.features))
    assert tuple(kernel.tile for kernel in manifest.tiles) == tiles
    assert not manifest.tuned


@NO_GPU
def test_where_no_gpu_is_seen_the_module_holds_the_source_of_each_kernel(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.kind == "cuda-source"
    module = (built / MODULE).read_bytes()
    for kernel in (*manifest.tiles, manifest.merge):
        assert b"%s_kernel(" % kernel.function.encode() in module


LOADERS: dict[str, Callable[[Path], object]] = {
    "Artifact.load": Artifact.load,
    "load": deft_tvm.load,
    "TreeAttention": lambda path: TreeAttention(SPEC, path),
    "TreeAttention, cpu": lambda path: TreeAttention(SPEC, path, "cpu"),
}


@NO_GPU
@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_gpu_it_is_refused_in_one_sentence(built: Path, loader: str) -> None:
    here = DeviceProfile.detect().slug
    with pytest.raises(ArtifactError) as refusal:
        LOADERS[loader](built)
    assert str(refusal.value) == (
        f"{built.resolve() / MANIFEST}: kind is 'cuda-source'; expected a module for cpu ({here})"
    )


def test_a_gpu_of_another_architecture_refuses_it(built: Path) -> None:
    sentence = rf"required_features is \['sm_90a'\]; expected only what {OLDER.slug} has"
    with pytest.raises(ArtifactError, match=sentence):
        Artifact.load(built, OLDER)

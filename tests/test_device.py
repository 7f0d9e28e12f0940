from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from deft_tvm import device as rooms
from deft_tvm.device import FEATURES, DeviceProfile, cuda_target, required_features, shared_limit
from deft_tvm.errors import InputError, LogError

V3 = ("sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt")
V4 = (*V3, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
BF16 = (*V4, "avx512vnni", "avx512bf16")
ZEN4 = (*BF16, "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq")
AMX = (*ZEN4, "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16")

INTEL_CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480C @ 2.00GHz
flags\t\t: fpu sse4_2 popcnt avx avx2 fma f16c bmi1 bmi2 abm avx512f avx512cd avx512bw \
avx512dq avx512vl avx512_vnni avx512_bf16 avx512ifma avx512vbmi avx512_vbmi2 avx512_bitalg \
avx512_vpopcntdq avx512_fp16 avx_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
flags\t\t: fpu
"""
ARM_CPUINFO = """processor\t: 0
Features\t: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file read in place of ``/proc/cpuinfo``."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(rooms, "_CPUINFO", path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return path


@pytest.mark.parametrize(
    ("features", "vendor", "mcpu", "tag"),
    [
        (AMX, "intel", "sapphirerapids", "amx"),
        (ZEN4, "amd", "znver4", "avx512bf16"),
        (ZEN4, "intel", "cooperlake", "avx512bf16"),
        (BF16, "amd", "cooperlake", "avx512bf16"),
        (V4, "intel", "skylake-avx512", "avx512"),
        ((*V3, "avx512f"), "intel", "haswell", "avx2"),
        (V3, "amd", "haswell", "avx2"),
        (("neon", "bf16", "sve"), "arm", "generic", "neon-bf16"),
        (("neon",), "arm", "generic", "neon"),
        (("sse4.2",), "intel", "x86-64", "x86-64"),
    ],
)
def test_target_follows_the_features(
    features: tuple[str, ...], vendor: str, mcpu: str, tag: str
) -> None:
    profile = DeviceProfile.nominal(cores=3, features=features, vendor=vendor, model="m")
    target = profile.target()
    assert (target["kind"], target["mcpu"], target["num-cores"]) == ("llvm", mcpu, 3)
    assert profile.slug == f"{vendor}-m-{tag}-3c"
    assert profile.lacks(required_features(target)) == ()


def test_an_artifact_demands_all_that_its_processor_implies() -> None:
    target = DeviceProfile.nominal(features=AMX, vendor="intel").target()
    assert set(required_features(target)) == set(AMX)
    assert "-gfni" in target["mattr"]
    old = DeviceProfile.nominal(features=BF16, vendor="intel")
    assert set(old.lacks(required_features(target))) == set(AMX) - set(BF16)


def test_llvm_accepts_every_target() -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm parses targets")
    for features in (AMX, ZEN4, BF16, V4, V3, ("neon", "bf16"), ()):
        for vendor in ("amd", "intel"):
            target = DeviceProfile.nominal(features=features, vendor=vendor).target()
            assert tvm.target.Target(target).attrs["mcpu"] == target["mcpu"]


def test_aarch64_names_its_triple() -> None:
    target = DeviceProfile.nominal(features=("neon",)).target()
    assert target["mtriple"] in ("aarch64-linux-gnu", "arm64-apple-darwin")
    assert required_features(target) == ("neon",)


def test_detect_reads_an_intel_processor(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo.write_text(INTEL_CPUINFO)
    monkeypatch.setattr(rooms, "permit_amx", lambda: True)
    profile = DeviceProfile.detect()
    assert profile.slug == "intel-xeon-platinum-8480c-amx-4c"
    assert set(profile.features) == set(AMX)
    assert (profile.cores, profile.kind, profile.measured) == (4, "cpu", False)


def test_amx_that_linux_denies_is_not_there(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo.write_text(INTEL_CPUINFO)
    monkeypatch.setattr(rooms, "permit_amx", lambda: False)
    profile = DeviceProfile.detect()
    assert profile.slug == "intel-xeon-platinum-8480c-avx512bf16-4c"
    assert profile.target()["mcpu"] == "cooperlake"
    assert not any(feature.startswith("amx") for feature in profile.features)


def test_amx_is_permitted_only_where_there_is_any() -> None:
    offered = "amx_tile" in Path("/proc/cpuinfo").read_text()
    assert rooms.permit_amx() <= offered


def test_detect_reads_an_arm_processor(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo.write_text(ARM_CPUINFO)
    monkeypatch.setattr(platform, "processor", lambda: "aarch64")
    profile = DeviceProfile.detect()
    assert profile.slug == "arm-aarch64-neon-bf16-4c"
    assert set(profile.features) == {"neon", "fullfp16", "dotprod", "sve", "i8mm", "bf16"}


def test_detect_asks_torch_where_the_kernel_tells_nothing(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"avx512_f": True, "fma3": True, "sse4_2": True, "amx_tile": False, "l2_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert DeviceProfile.detect().features == ("sse4.2", "fma", "avx512f")


def test_detect_here() -> None:
    profile = DeviceProfile.detect()
    assert profile.cores == torch.get_num_threads()
    assert set(profile.features) <= set(FEATURES)
    assert profile.lacks(required_features(profile.target())) == ()
    assert profile.l2_bytes > 0 and profile.read_bandwidth > 0
    assert all(rate > 0 for rate in profile.matrix_rate.values())


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("AMD EPYC 9654 96-Core Processor", "epyc-9654"),
        ("Intel Xeon Processor (SapphireRapids)", "xeon-sapphirerapids"),
        ("Intel(R) Xeon(R) Processor @ 2.60GHz", "xeon"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("", "unknown"),
    ],
)
def test_model_of_a_name(
    name: str, model: str, cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo.write_text(f"model name\t: {name}\nflags\t\t: fpu\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "")
    assert DeviceProfile.detect().slug == f"generic-{model}-x86-64-4c"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], DeviceProfile]:
    """The profile of a GPU with a compute capability, as torch would tell of it."""

    def detected(major: int, minor: int) -> DeviceProfile:
        told = SimpleNamespace(
            major=major, minor=minor, name="NVIDIA H200", multi_processor_count=132, L2_cache_size=1
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
        return DeviceProfile.detect("cuda")

    return detected


def test_gpu_binaries_run_on_newer_minors_and_specific_ones_at_home(gpu) -> None:
    assert gpu(8, 9).features[-1] == "sm_89"
    assert "sm_80" in gpu(8, 9).features
    assert gpu(9, 0).features == ("sm_90", "sm_90a")
    assert gpu(9, 0).target() == cuda_target("sm_90a")
    assert "sm_90a" not in gpu(10, 0).features


def test_cuda_target_states_its_shared_memory() -> None:
    target = cuda_target("sm_90a")
    assert (target["arch"], target["max_shared_memory_per_block"]) == ("sm_90a", 227 * 1024)
    assert required_features(target) == ("sm_90a",)


@pytest.mark.parametrize(
    ("arch", "kib"),
    [("sm_80", 163), ("sm_89", 99), ("sm_100a", 227), ("sm_121a", 99), ("sm_1", 48)],
)
def test_schedules_and_plans_count_on_the_same_shared_memory(arch: str, kib: int) -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm parses targets")
    assert shared_limit(arch) == kib * 1024
    assert cuda_target(arch)["max_shared_memory_per_block"] == kib * 1024
    parsed = tvm.target.Target(cuda_target(arch), host="llvm")
    assert parsed.attrs["max_shared_memory_per_block"] == kib * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(InputError, match="kind is 'cuda'; torch sees no GPU here"):
        DeviceProfile.detect("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_detect_gpu() -> None:
    profile = DeviceProfile.detect("cuda")
    assert profile.slug.startswith("nvidia-") and profile.cores > 0
    assert profile.target()["arch"] == profile.features[-1]


def test_json_round_trip(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(DeviceProfile.detect(), measured=True, date="2026-11-21")
    profile.write(tmp_path / "device.json")
    assert DeviceProfile.read(tmp_path / "device.json") == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; expected a file"),
        ("{", "cannot be read: Input data was truncated"),
        ('{"slug": 3}', r"cannot be read: Expected `str`, got `int` - at `\$.slug`"),
        ("{", "remove it and tune, or run `deft-tvm info --measure`, to measure the device again"),
        (b"\xff", "cannot be read: "),
        (b'{"slug": "\xff"}', "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_damaged_profile_is_refused(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    path = tmp_path / "device.json"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(LogError, match=f"device profile {path}.*{message}"):
        DeviceProfile.read(path)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"read_bandwidth": -3e10}, r"Expected `float` > 0.0 - at `\$.read_bandwidth`"),
        ({"read_bandwidth": "fast"}, r"Expected `float`, got `str` - at `\$.read_bandwidth`"),
        ({"matrix_rate": {"float32": 0.0}}, r"Expected `float` > 0.0 - at `\$.matrix_rate"),
        ({"matrix_rate": {}}, r"matrix_rate is {}; expected one of float32"),
        ({"launch_seconds": 0}, r"Expected `float` > 0.0 - at `\$.launch_seconds`"),
        ({"cores": 0}, r"Expected `int` >= 1 - at `\$.cores`"),
        ({"l3_bytes": -1}, r"Expected `int` >= 0 - at `\$.l3_bytes`"),
        ({"kind": "cuda", "features": []}, r"features are empty; expected the architectures"),
    ],
    ids=str,
)
def test_a_profile_of_no_device_is_refused(
    tmp_path: Path, field: dict[str, object], message: str
) -> None:
    path = tmp_path / "device.json"
    given = msgspec.to_builtins(DeviceProfile.nominal()) | field
    path.write_bytes(msgspec.json.encode(given))
    with pytest.raises(LogError, match=message):
        DeviceProfile.read(path)


@pytest.mark.parametrize(
    ("features", "dtype", "multiplied"),
    [
        (V3, "bfloat16", "float32"),
        (V3, "float16", "float32"),
        (ZEN4, "bfloat16", "bfloat16"),
        (ZEN4, "float32", "float32"),
        (ZEN4, "float64", "float32"),
    ],
)
def test_a_product_is_of_the_type_that_is_multiplied_faster(
    features: tuple[str, ...], dtype: str, multiplied: str
) -> None:
    assert DeviceProfile.nominal(features=features, vendor="amd").product_dtype(dtype) == multiplied

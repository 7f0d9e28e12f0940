"""What a plan and a compiler need to know of the machine; a leaf that measures nothing.

Instruction sets are what the kernel says that the processor offers (``/proc/cpuinfo``, elsewhere
torch), never what LLVM takes the host for, which under virtual machines is often an older one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from deft_tvm.errors import InputError, LogError
from deft_tvm.files import from_json, write_whole

_V3 = ("sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt")
_V4 = (*_V3, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
_BF16 = (*_V4, "avx512vnni", "avx512bf16")
_BYTES = ("avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq")
_ZEN4 = (*_BF16, *_BYTES)
_AMX = (*_ZEN4, "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16")
_ARM = ("neon", "fullfp16", "dotprod", "bf16", "i8mm", "sve", "sve2")

Kind = Literal["cpu", "cuda"]
Positive = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=0)]

#: Names of instruction sets that a profile may hold, LLVM's spelling.
FEATURES = (*_AMX, *_ARM)


class _Level(msgspec.Struct, frozen=True):
    """An LLVM processor, and all that code generated for it may use."""

    tag: str
    mcpu: str
    needs: tuple[str, ...]
    vendor: str = ""
    rate: float = 0.0  # bfloat16 FLOP/s of one core; float32 is `rate32`
    rate32: float = 0.0


# Best first. Rates are what dense products reached on one core of such machines, to one digit.
_LEVELS = (
    _Level("amx", "sapphirerapids", _AMX, rate=1e12, rate32=1.7e11),
    _Level("avx512bf16", "znver4", _ZEN4, "amd", rate=2e11, rate32=9e10),
    _Level("avx512bf16", "cooperlake", _BF16, rate=2e11, rate32=9e10),
    _Level("avx512", "skylake-avx512", _V4, rate=8e10, rate32=9e10),
    _Level("avx2", "haswell", _V3, rate=4e10, rate32=5e10),
    _Level("neon-bf16", "generic", ("neon", "bf16"), rate=1e11, rate32=3e10),
    _Level("neon", "generic", ("neon",), rate=3e10, rate32=3e10),
    _Level("x86-64", "x86-64", (), rate=1e10, rate32=1e10),
)

# These two processors have GFNI, which torch does not report: no module may come to need it.
_UNREPORTED = {"sapphirerapids": ("-gfni",), "znver4": ("-gfni",)}

# KiB of shared memory that one block may ask for, by compute capability, and what every GPU gives
# without being asked (CUDA C++ programming guide, technical specifications).
_SHARED_KIB = {
    "75": 64,
    "80": 163,
    "86": 99,
    "87": 163,
    "89": 99,
    "90": 227,
    "100": 227,
    "103": 227,
    "110": 227,
    "120": 99,
    "121": 99,
}
LEAST_SHARED_BYTES = 48 * 1024

_CPUINFO = Path("/proc/cpuinfo")


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device: what it can execute and how fast, as a guess or as measured.

    Attributes:
        slug: vendor, model, best matrix instruction set, cores: the name of its folder of logs.
        name: as the vendor calls it.
        kind: ``cpu`` or ``cuda``.
        cores: threads that torch runs on, or streaming multiprocessors.
        features: instruction sets in LLVM's spelling, or the ``sm_`` architectures whose
            binaries a GPU runs, best last.
        l2_bytes: second-level cache of one core, or of a GPU.
        l3_bytes: last-level cache that the cores share; 0 where there is none.
        read_bandwidth: bytes per second from memory, all cores together.
        matrix_rate: FLOP per second of dense products, all cores together, by operand dtype.
        launch_seconds: fixed cost of one kernel launch.
        measured: the rates come from a measurement and not from a table.
        date: ISO date of the measurement, empty if there was none.
    """

    slug: str
    name: str
    kind: Kind
    cores: Annotated[int, Meta(gt=0)]
    features: tuple[str, ...]
    l2_bytes: Bytes
    l3_bytes: Bytes
    read_bandwidth: Positive
    matrix_rate: dict[str, Positive]
    launch_seconds: Positive
    measured: bool = False
    date: str = ""

    def __post_init__(self) -> None:
        if "float32" not in self.matrix_rate:
            raise InputError(f"matrix_rate is {self.matrix_rate}; expected one of float32")
        if self.kind == "cuda" and not self.features:
            raise InputError("features are empty; expected the architectures that a GPU runs")

    @classmethod
    def nominal(
        cls, cores: int = 2, features: Iterable[str] = _V3, vendor: str = "generic", model: str = ""
    ) -> DeviceProfile:
        """An unmeasured CPU with given instruction sets: the same wherever it is called."""
        have = tuple(feature for feature in FEATURES if feature in set(features))
        level = _level(have, vendor)
        return cls(
            slug="-".join(filter(None, (vendor, model, level.tag, f"{cores}c"))),
            name=" ".join(filter(None, (vendor, model))),
            kind="cpu",
            cores=cores,
            features=have,
            l2_bytes=1 << 20,
            l3_bytes=32 << 20,
            read_bandwidth=min(cores * 1.7e10, 2e11),
            matrix_rate={
                "float32": level.rate32 * cores,
                "float16": level.rate32 * cores,
                "bfloat16": level.rate * cores,
            },
            launch_seconds=5e-6,
        )

    @classmethod
    def detect(cls, kind: Kind = "cpu") -> DeviceProfile:
        """This machine's CPU (with as many cores as torch has threads) or current GPU.

        Rates are nominal until they are measured; reading takes milliseconds.

        Raises:
            InputError: `kind` is ``cuda`` and torch sees no GPU.
        """
        return _detect_cuda() if kind == "cuda" else _detect_cpu()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """The profile in a JSON file.

        Raises:
            LogError: the file is missing or is not a profile.
        """
        try:
            return from_json(Path(path).read_bytes(), cls)
        except OSError as error:
            raise LogError(f"device profile {path}: {error.strerror}; expected a file") from None
        except msgspec.MsgspecError as error:
            raise LogError(
                f"device profile {path} cannot be read: {error}; remove it and tune, or run "
                "`deft-tvm info --measure`, to measure the device again"
            ) from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as indented JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def product_rate(self, dtype: str) -> float:
        """FLOP per second of products of `dtype`, or of what it is converted to."""
        return self.matrix_rate[self.product_dtype(dtype)]

    def product_dtype(self, dtype: str) -> str:
        """What matrices of `dtype` are multiplied in soonest: itself, or what it is converted to.

        Where a CPU has no instructions for it torch takes bfloat16 element by element, at a
        hundredth of float32's rate.
        """
        return max(("float32", dtype), key=lambda name: self.matrix_rate.get(name, 0.0))

    def target(self) -> dict[str, Any]:
        """TVM target attributes of the device."""
        return self.llvm_target() if self.kind == "cpu" else cuda_target(self.features[-1])

    def llvm_target(self) -> dict[str, Any]:
        """TVM target attributes for the best LLVM processor whose every feature is here.

        ``mattr`` names all that an artifact built for it demands where it is loaded.
        """
        level = _level(self.features, self.slug.partition("-")[0])
        target: dict[str, Any] = {"kind": "llvm", "mcpu": level.mcpu, "num-cores": self.cores}
        if "neon" in self.features:
            target["mtriple"] = _arm_triple()
        extra = _UNREPORTED.get(level.mcpu, ())
        return target | {"mattr": [*(f"+{feature}" for feature in level.needs), *extra]}

    def lacks(self, required: Iterable[str]) -> tuple[str, ...]:
        """Those of the `required` features that the device does not have."""
        return tuple(feature for feature in required if feature not in self.features)


def required_features(target: Mapping[str, Any]) -> tuple[str, ...]:
    """What a device must have to run code that was compiled for `target`."""
    if target["kind"] == "cuda":
        return (str(target["arch"]),)
    return tuple(item[1:] for item in target.get("mattr", ()) if item.startswith("+"))


def _level(features: Iterable[str], vendor: str) -> _Level:
    have = set(features)
    fitting = (level for level in _LEVELS if have.issuperset(level.needs))
    return next(level for level in fitting if level.vendor in ("", vendor))


def _arm_triple() -> str:
    native = platform.machine() == "arm64" and platform.system() == "Darwin"
    return "arm64-apple-darwin" if native else "aarch64-linux-gnu"


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one block may ask for; of an unknown GPU, the least of any."""
    kib = _SHARED_KIB.get(re.sub(r"\D", "", arch))
    return LEAST_SHARED_BYTES if kib is None else kib * 1024


def cuda_target(arch: str) -> dict[str, Any]:
    """TVM target attributes of a GPU; TVM has no table of shared memory sizes of its own.

    Args:
        arch: as nvcc names it, ``sm_90a``.
    """
    return {
        "kind": "cuda",
        "arch": arch,
        "max_num_threads": 1024,
        "thread_warp_size": 32,
        "max_shared_memory_per_block": shared_limit(arch),
    }


def _detect_cpu() -> DeviceProfile:
    import torch

    cpuinfo = _cpuinfo()
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    vendor, model = _vendor(cpuinfo, name), _model(name)
    features = _normalised(cpuinfo["flags"].split() or _capabilities())
    if "amx-tile" in features and not permit_amx():
        features = {feature for feature in features if not feature.startswith("amx-")}
    profile = DeviceProfile.nominal(torch.get_num_threads(), features, vendor, model)
    l2, l3 = (_cache_bytes(level) for level in (2, 3))
    return msgspec.structs.replace(
        profile, name=name, l2_bytes=l2 or profile.l2_bytes, l3_bytes=l3 or profile.l3_bytes
    )


@cache
def permit_amx() -> bool:
    """Ask Linux for AMX's tile registers, as a process must before it uses them; False if denied.

    See Documentation/arch/x86/xstate.rst of Linux. Asking again does no harm.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def gpu_error() -> str:
    """Why this process can use its GPU no more; empty while it can, or where it has not begun to.

    After a bad access a GPU refuses all that the process asks: a new one has to go on.
    """
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def _detect_cuda() -> DeviceProfile:
    import torch

    if not torch.cuda.is_available():
        raise InputError("kind is 'cuda'; torch sees no GPU here, expected one")
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    features = _cuda_features(device.major, device.minor)
    model, cores = _model(device.name), device.multi_processor_count
    # Dense tensor-core and FMA work of one multiprocessor in a clock, at 1.5 GHz.
    dense = 1.5e9 * cores * (4096 if device.major >= 9 else 1024)
    return DeviceProfile(
        slug=f"nvidia-{model}-{features[-1].replace('_', '')}-{cores}sm",
        name=device.name,
        kind="cuda",
        cores=cores,
        features=features,
        l2_bytes=device.L2_cache_size,
        l3_bytes=0,
        read_bandwidth=2e12,
        matrix_rate={"float32": 1.5e9 * cores * 256, "float16": dense, "bfloat16": dense},
        launch_seconds=5e-6,
    )


def _cuda_features(major: int, minor: int) -> tuple[str, ...]:
    """Architectures whose binaries run: older minors of the major, and its own specific one."""
    archs = tuple(f"sm_{major}{older}" for older in range(minor + 1))
    return (*archs, f"sm_{major}{minor}a") if major >= 9 else archs


def _capabilities() -> tuple[str, ...]:
    """Instruction sets that torch reports; empty for a torch that cannot."""
    import torch

    report: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(name for name, value in report.items() if value is True)


def _normalised(names: Iterable[str]) -> set[str]:
    """LLVM's spelling of the names that torch and Linux use."""
    known = {
        **{"fma3": "fma", "abm": "lzcnt", "bmi1": "bmi", "sse4_2": "sse4.2", "dot": "dotprod"},
        **{"asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "fp16_arith": "fullfp16"},
    }
    dashed = (known.get(name, name.replace("amx_", "amx-")) for name in names)
    return {name.replace("_", "") for name in dashed}


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; ARM's ``Features`` under ``flags``."""
    text = _CPUINFO.read_text().partition("\n\n")[0] if _CPUINFO.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    return {"flags": fields.get("Features", "")} | fields


def _vendor(cpuinfo: Mapping[str, str], name: str) -> str:
    known = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "0x41": "arm", "0xc0": "ampere"}
    reported = cpuinfo.get("vendor_id", cpuinfo.get("CPU implementer", ""))
    return known.get(reported, "apple" if "Apple" in name else "generic")


def _model(name: str) -> str:
    """``AMD EPYC 9654 96-Core Processor`` → ``epyc-9654``."""
    noise = r"\((r|tm)\)|@.*|\d+-core|\b(amd|intel|apple|nvidia|processor|cpu|with)\b"
    words = re.sub(noise, " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"


def _cache_bytes(level: int) -> int:
    """Size of the unified cache of `level` of the first processor; 0 where it is not told."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            size = (index / "size").read_text().strip()
            return int(size.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return 0

"""What an exported module says of itself, and how both are written so that no reader sees a half.

An artifact is a folder: ``module.so`` and ``manifest.json``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
import platformdirs

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.dtypes import Dtype
from deft_tvm.errors import ArtifactError
from deft_tvm.files import AnyPath, from_json, replace_folder
from deft_tvm.spec import AttentionSpec, TileShape

#: Version of the manifest's fields; a reader refuses a newer one.
SCHEMA = 1
#: Version of the kernels' arguments and of the plan arrays that they read; must be equal.
KERNEL_ABI = 6

MODULE = "module.so"
MANIFEST = "manifest.json"
DEFAULT = "default"

Need = Literal["torch_pool", "tvm_runtime"]


class Kernel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One function of a module.

    Attributes:
        function: its symbol.
        decision: the choices of its schedule, by name.
        tuned_from: the log entry (id, date, device) that they come from, or ``default``.
    """

    function: str
    decision: dict[str, int]
    tuned_from: str = DEFAULT


class TileKernel(Kernel, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The partial kernel of one tile class."""

    lane_rows: int
    kv_tile: int
    operand: Dtype
    heads: int = 1

    @property
    def tile(self) -> TileShape:
        return TileShape(self.lane_rows, self.kv_tile, self.operand, self.heads)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides whether a module may be loaded here, and where it came from.

    Attributes:
        spec: the attention, as ``str(spec)``.
        tiles: partial kernels, in the order of the plan's tile classes.
        merge: the kernel that reduces partials.
        target: TVM target attributes that it was compiled for.
        required_features: instruction sets, or the ``sm_`` architecture, that it needs.
        device: slug of the device that it was tuned on, or built for.
        kind: machine code for a CPU or GPU, or CUDA source that is compiled where it is loaded.
        versions: of deft_tvm, tvm, tvm_ffi and torch, where it was built.
        created: ISO date and time.
        needs: what the loader must see to: ``torch_pool`` for a CPU module, ``tvm_runtime`` for a
            GPU module.
        sha256: of ``module.so``; filled when the artifact is written.
        lse_base: base of the log-sum-exps that its functions take and give.
        schema: version of these fields.
        kernel_abi: version of the functions' arguments.
    """

    spec: str
    tiles: tuple[TileKernel, ...]
    merge: Kernel
    target: dict[str, Any]
    required_features: tuple[str, ...]
    device: str
    kind: Literal["cpu", "cuda-cubin", "cuda-source"]
    versions: dict[str, str]
    created: str
    needs: tuple[Need, ...] = ()
    sha256: str = ""
    lse_base: Literal["e"] = "e"
    schema: int = SCHEMA
    kernel_abi: int = KERNEL_ABI

    @property
    def tuned(self) -> bool:
        """Some kernel's decision comes from a log."""
        return any(kernel.tuned_from != DEFAULT for kernel in (*self.tiles, self.merge))

    @property
    def device_kind(self) -> Kind:
        return "cpu" if self.kind == "cpu" else "cuda"


class _Header(msgspec.Struct):
    """The fields that every version of a manifest has."""

    schema: int
    kernel_abi: int


def read_manifest(directory: AnyPath) -> Manifest:
    """The manifest of an artifact.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    path = Path(directory, MANIFEST)
    try:
        text = path.read_bytes()
        header = from_json(text, _Header)
        if header.schema > SCHEMA:
            refuse(path, "schema", header.schema, f"{SCHEMA} or older: update deft_tvm")
        if header.kernel_abi != KERNEL_ABI:
            refuse(path, "kernel_abi", header.kernel_abi, f"{KERNEL_ABI}: build the module again")
        return from_json(text, Manifest)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; expected a manifest") from None
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def check_whole(directory: AnyPath, sha256: str, spec: str) -> Path:
    """The module in a folder, if it is the file that the manifest's `sha256` was made of.

    Raises:
        ArtifactError: it is missing, damaged or truncated; says how to make one of `spec` again.
    """
    path = Path(directory, MODULE)
    again = f"`deft-tvm build --spec {spec} --out {directory}` makes it again"
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; expected a module: {again}") from None
    if found != sha256:
        refuse(path, "sha256", found, f"{sha256!r}: the file is damaged or truncated; {again}")
    return path


def check_place(directory: AnyPath) -> Path:
    """Refuse a folder that no artifact can be written to, before one is compiled for it.

    All that is in the folder is replaced, so there must be nothing but an artifact. Makes the
    folders above.

    Raises:
        ArtifactError: something else is there, it is the current folder, or it cannot be written.
    """
    final = Path(directory)
    if final.exists() and final.samefile(os.curdir):
        raise ArtifactError(
            f"{directory} is the folder in which this runs; expected another one, as a module's "
            "folder is replaced by a new one"
        )
    names: list[str] = []
    with _writing(final):
        _try_to_write(final.parent)
        with suppress(FileNotFoundError):
            names = os.listdir(final)
    if others := set(names) - {MODULE, MANIFEST}:
        raise ArtifactError(
            f"{final} has {min(others)!r} in it; expected a new folder, or one with nothing but a "
            "module, as all of it is replaced"
        )
    return final


def check_folder(directory: AnyPath) -> Path:
    """Make a folder, and refuse one that no file can be written to.

    Raises:
        ArtifactError: it cannot be made or written.
    """
    with _writing(directory):
        _try_to_write(Path(directory))
    return Path(directory)


@contextmanager
def _writing(directory: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written: {error.filename}: {error.strerror}; expected a folder "
            "that can"
        ) from None


def _try_to_write(folder: Path) -> None:
    """As those who write there will do: permissions alone do not tell."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".deft-tvm-", dir=folder):
        pass


def write_artifact(directory: AnyPath, manifest: Manifest, module_file: AnyPath) -> Path:
    """Write a complete artifact, replacing one that is there; the manifest gets the sha256.

    A reader sees the old artifact or the new one, see `files.replace_folder`, never a mixture.

    Raises:
        ArtifactError: as `check_place`.
    """
    final = check_place(directory)
    try:
        _write(final, manifest, Path(module_file))
    except OSError as error:
        raise ArtifactError(
            f"{final} cannot be written: {error.strerror}; what was there before still is"
        ) from error
    return final


def _write(final: Path, manifest: Manifest, module_file: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        shutil.copyfile(module_file, new / MODULE)
        complete = msgspec.structs.replace(manifest, sha256=file_sha256(new / MODULE))
        text = msgspec.json.format(msgspec.json.encode(complete), indent=2)
        (new / MANIFEST).write_bytes(text + b"\n")
        for path in (*new.iterdir(), new):
            _sync(path)
        replace_folder(new, final)
        _sync(final.parent)


def cache_root() -> Path:
    """The user's own folder of modules."""
    return platformdirs.user_cache_path("deft_tvm", appauthor=False) / "modules"


def cache_directory(spec: AttentionSpec, device: DeviceProfile) -> Path:
    """Where a module of `spec` for `device` is kept between processes."""
    return cache_root() / device.slug / spec.slug


def installed_versions() -> dict[str, str]:
    """Versions for a new manifest; a package that is not installed is left out."""
    packages = {"deft_tvm": "deft-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {
        name: version
        for name, package in (packages | {"torch": "torch"}).items()
        if (version := _version(package))
    }


def source_commit() -> str:
    """Of the source tree that this package lies in; empty outside one."""
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def file_sha256(path: AnyPath) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def refuse(path: AnyPath, field: str, found: object, wanted: str) -> NoReturn:
    """Raise the one sentence in which every artifact is refused."""
    raise ArtifactError(f"{path}: {field} is {found!r}; expected {wanted}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

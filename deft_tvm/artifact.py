"""Exported modules at run time: load one, or find the best one for a spec and a device.

Needs apache-tvm-ffi and torch; no compiler. `find` alone crosses over to `build`, when there is no
module and the compiler is installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

import filelock
import tvm_ffi

from deft_tvm import env, threads
from deft_tvm.debug import tell
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError, CompilerMissing, installing
from deft_tvm.manifest import (
    MANIFEST,
    MODULE,
    AnyPath,
    Manifest,
    cache_directory,
    cache_root,
    file_sha256,
    read_manifest,
    refuse,
)
from deft_tvm.plan.compiled import FUNCTION as PLANNER
from deft_tvm.spec import AttentionSpec, TileShape

#: Packages that ship modules name here a folder, or a function that returns one.
ENTRY_POINTS = "deft_tvm.modules"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded module and what it says of itself."""

    directory: Path
    manifest: Manifest
    module: tvm_ffi.Module

    @classmethod
    def load(
        cls,
        directory: AnyPath,
        device: DeviceProfile | None = None,
        spec: AttentionSpec | None = None,
    ) -> Artifact:
        """Load the artifact in a folder; a module that this process has loaded is not loaded again.

        Args:
            directory: holds ``module.so`` and ``manifest.json``.
            device: where it shall run, by default this machine's CPU or current GPU.
            spec: refuse a module for any other attention.

        Raises:
            ArtifactError: it is missing, damaged, of another version, for another device or spec,
                or needs an instruction set that the device lacks.
        """
        directory = Path(directory).resolve()
        manifest = read_manifest(directory)
        check_fits(directory, manifest, device or _device_here(manifest), spec)
        module = _load_module(directory / MODULE, manifest.sha256, manifest.needs)
        return cls(directory, manifest, module)

    @cached_property
    def spec(self) -> AttentionSpec:
        return AttentionSpec.parse(self.manifest.spec)

    @cached_property
    def tiles(self) -> tuple[TileShape, ...]:
        """Tile classes that the module has kernels for, in the order of `partial`."""
        return tuple(kernel.tile for kernel in self.manifest.tiles)

    @cached_property
    def _partials(self) -> tuple[tvm_ffi.Function, ...]:
        return tuple(self._function(kernel.function) for kernel in self.manifest.tiles)

    def partial(self, tile: int) -> tvm_ffi.Function:
        """The kernel of stage 1 for tile class number `tile`."""
        return self._partials[tile]

    @cached_property
    def merge(self) -> tvm_ffi.Function:
        """The kernel of stage 2."""
        return self._function(self.manifest.merge.function)

    def runner(self, wanted: int) -> tvm_ffi.Function:
        """All kernels by one packed plan, see `deft_tvm/native/run.c`.

        Args:
            wanted: address of what tensors must be, which outlives the function.
        """
        partials = map(self.partial, range(len(self.tiles)))
        return self._function("runner")(wanted, self.spec.sinks, self.merge, *partials)

    @cached_property
    def planner(self) -> tvm_ffi.Function:
        """The compiled planner; see `deft_tvm.plan.compiled`."""
        return self._function(PLANNER)

    def _function(self, name: str) -> tvm_ffi.Function:
        if not self.module.implements_function(name):
            path = self.directory / MODULE
            raise ArtifactError(f"{path} has no function {name!r}; build the module again")
        return self.module.get_function(name)


def check_fits(
    directory: AnyPath, manifest: Manifest, device: DeviceProfile, spec: AttentionSpec | None = None
) -> None:
    """Refuse a module that is not for `device` or not for `spec`.

    Raises:
        ArtifactError: names the first field that does not fit.
    """
    path = Path(directory, MANIFEST)
    if spec is not None and manifest.spec != str(spec):
        refuse(path, "spec", manifest.spec, str(spec))
    if manifest.device_kind != device.kind:
        refuse(path, "kind", manifest.kind, f"a module for {device.kind} ({device.slug})")
    if missing := device.lacks(manifest.required_features):
        refuse(path, "required_features", list(missing), f"only what {device.slug} has")


def search_path(path: AnyPath | None = None) -> list[Path]:
    """Folders where modules are looked for: `path`, the environment, packages, the user's cache."""
    return [*_named(path), *_from_packages(), cache_root()]


def find(
    spec: AttentionSpec, device: DeviceProfile | None = None, path: AnyPath | None = None
) -> Artifact:
    """The best module for `spec` on `device`.

    Folders that the user named (`path`, ``DEFT_TVM_MODULE_PATH``) go before others; then a module
    for this very device before one that merely runs on it, a tuned one before a default, the newest
    first. If there is none, the default is built and cached.

    Raises:
        CompilerMissing: there is no module, and no compiler to build one.
        ArtifactError: the best module is damaged.
    """
    device = device or DeviceProfile.detect()
    passed_over: list[str] = []
    best = _best(spec, device, path, passed_over) or _build_default(spec, device, path, passed_over)
    artifact = Artifact.load(best, device, spec)
    kernels = (*artifact.manifest.tiles, artifact.manifest.merge)
    tell(1, "module", lambda: "\n".join(f"{best}: {k.function}: {k.tuned_from}" for k in kernels))
    return artifact


def _build_default(
    spec: AttentionSpec, device: DeviceProfile, path: AnyPath | None, passed_over: list[str]
) -> Path:
    """Build and cache the default module, unless another process has done it meanwhile."""
    try:
        from deft_tvm import build
    except ImportError as error:
        raise CompilerMissing(_advice(spec, device, path, passed_over)) from error
    directory = cache_directory(spec, device)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{directory}.lock"):
        return _best(spec, device, path) or build.build_default(spec, device)


def _advice(
    spec: AttentionSpec, device: DeviceProfile, path: AnyPath | None, passed_over: list[str]
) -> str:
    looked = ", ".join(map(str, search_path(path)))
    others = f" (passed over: {'; '.join(passed_over)})" if passed_over else ""
    return (
        f"no module for spec {spec} on {device.slug} in {looked}{others}, and no compiler to build "
        f"one; run {installing('tune')}, or `deft-tvm build --spec {spec}` on a "
        f"machine that has it and name the module's folder in {env.MODULE_PATH.name}"
    )


def _best(
    spec: AttentionSpec,
    device: DeviceProfile,
    path: AnyPath | None,
    passed_over: list[str] | None = None,
) -> Path | None:
    """The folder of the best fitting module; `passed_over` is told of those refused, and why."""
    found = []
    named = _named(path)
    for directory in _artifacts(search_path(path)):
        try:
            manifest = read_manifest(directory)
            if manifest.spec != str(spec) or (env.UNTUNED.get() and manifest.tuned):
                continue
            check_fits(directory, manifest, device)
        except ArtifactError as error:
            if passed_over is not None:
                passed_over.append(str(error))
            continue
        by_user = any(directory.is_relative_to(root) for root in named)
        own = manifest.device == device.slug
        found.append(((by_user, own, manifest.tuned, manifest.created), directory))
    return max(found)[1] if found else None


def _artifacts(roots: Sequence[Path]) -> Iterator[Path]:
    """Artifacts that are a root, or one or two folders below it (device, spec).

    Hidden folders are artifacts that are being written.
    """
    for root in roots:
        for pattern in (MANIFEST, f"[!.]*/{MANIFEST}", f"[!.]*/[!.]*/{MANIFEST}"):
            yield from (file.parent for file in sorted(root.glob(pattern)))


def _named(path: AnyPath | None) -> list[Path]:
    return [*([] if path is None else [Path(path)]), *env.MODULE_PATH.get()]


def _from_packages() -> Iterator[Path]:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            value = entry.load()
            yield Path(value() if callable(value) else value)
        except Exception as error:  # a broken package must not hide the modules of others
            warnings.warn(f"entry point {entry.value!r} of {ENTRY_POINTS}: {error}", stacklevel=2)


def _device_here(manifest: Manifest) -> DeviceProfile:
    import torch

    on_gpu = manifest.device_kind == "cuda" and torch.cuda.is_available()
    return DeviceProfile.detect("cuda" if on_gpu else "cpu")


@cache
def _load_module(path: Path, sha256: str, needs: tuple[str, ...]) -> tvm_ffi.Module:
    """Load once per process and content."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; expected a module") from None
    if found != sha256:
        refuse(path, "sha256", found, f"{sha256!r}: the file is damaged or truncated")
    if "tvm_runtime" in needs:
        _load_tvm_runtime(path)
    with _own_name(path) as name:
        module = tvm_ffi.load_module(name)
        if "torch_pool" in needs:
            threads.adopt_pool(name)
    return module


_loaded_names: set[Path] = set()


@contextmanager
def _own_name(path: Path) -> Iterator[Path]:
    """A name for `path` that was not loaded yet: the linker knows a library by its name, and would
    answer with the old code when a module that was replaced is loaded again.
    """
    if path not in _loaded_names:
        _loaded_names.add(path)
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copy(path, scratch))


def _load_tvm_runtime(path: Path) -> None:
    """TVM's CUDA runtime, without its compiler; a GPU module cannot be loaded without it."""
    package = importlib.util.find_spec("tvm")
    if package is None or package.origin is None:
        raise CompilerMissing(f"{path} needs TVM's CUDA runtime; run `pip install apache-tvm`")
    for library in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        try:
            ctypes.CDLL(str(Path(package.origin).parent / "lib" / library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(
                f"{path} needs TVM's CUDA runtime, which cannot be loaded: {error}; expected a GPU "
                f"and its driver"
            ) from None

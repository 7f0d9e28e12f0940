"""Exported modules at run time: load one, or the best one for a spec and a device.

Needs apache-tvm-ffi and torch; no compiler. `find` alone crosses over to `build`, when there is no
module and the compiler is installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import filelock
import tvm_ffi

from deft_tvm import env, threads
from deft_tvm.debug import tell
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError, CompilerMissing, installing
from deft_tvm.files import AnyPath
from deft_tvm.finding import Candidate, candidates, check_fits, search_path
from deft_tvm.manifest import (
    MODULE,
    Manifest,
    cache_directory,
    check_whole,
    read_manifest,
)
from deft_tvm.plan.compiled import FUNCTION as PLANNER
from deft_tvm.spec import AttentionSpec, TileShape


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
            device: what it shall fit beside this machine's CPU or current GPU.
            spec: refuse a module for any other attention.

        Raises:
            ArtifactError: it is missing, damaged, of another version, for another device or spec,
                or needs an instruction set that the device lacks.
        """
        directory = Path(directory).resolve()
        # Another process may have replaced it between its manifest and its library.
        with suppress(ArtifactError):
            return cls._load(directory, device, spec)
        return cls._load(directory, device, spec)

    @classmethod
    def _load(
        cls, directory: Path, device: DeviceProfile | None, spec: AttentionSpec | None
    ) -> Artifact:
        manifest = read_manifest(directory)
        # The machine too, whatever `device` says: an instruction that it lacks ends the process.
        for where in filter(None, (device, _device_here(manifest))):
            check_fits(directory, manifest, where, spec)
        module = _load_module(directory, manifest.sha256, manifest.needs, manifest.spec)
        return cls(directory, manifest, module)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is loaded from the same folder."""
        return Artifact.load, (self.directory,)

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
        """All kernels by one plan, see `deft_tvm/native/run.c`.

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


def find(
    spec: AttentionSpec, device: DeviceProfile | None = None, path: AnyPath | None = None
) -> Artifact:
    """The best module for `spec` on `device`.

    Which one that is, `deft_tvm.finding.candidates` says. If there is none, the default is built
    and cached.

    Raises:
        CompilerMissing: there is no module, and no compiler to build one.
        ArtifactError: the best module is damaged, or `device` has what this machine lacks.
    """
    device = device or DeviceProfile.detect()
    found = candidates(spec, device, path)
    best = _taken(found) or _build_default(spec, device, path, found)
    artifact = Artifact.load(best, device, spec)
    kernels = (*artifact.manifest.tiles, artifact.manifest.merge)
    tell(1, "module", lambda: "\n".join(f"{best}: {k.function}: {k.tuned_from}" for k in kernels))
    return artifact


def _taken(found: Sequence[Candidate]) -> Path | None:
    return next((candidate.directory for candidate in found if candidate.taken), None)


def _build_default(
    spec: AttentionSpec, device: DeviceProfile, path: AnyPath | None, found: Sequence[Candidate]
) -> Path:
    """Build and cache the default module, unless another process has done it meanwhile."""
    try:
        from deft_tvm import build
    except ImportError as error:
        raise CompilerMissing(_advice(spec, device, path, found)) from error
    directory = cache_directory(spec, device)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{directory}.lock"):
        return _taken(candidates(spec, device, path)) or build.build_default(spec, device)


def _advice(
    spec: AttentionSpec, device: DeviceProfile, path: AnyPath | None, found: Sequence[Candidate]
) -> str:
    looked = ", ".join(str(place.folder) for place in search_path(path))
    # Of modules of other specs there may be many.
    own = (c for c in found if c.manifest is None or c.manifest.spec == str(spec))
    passed_over = "; ".join(f"{candidate.directory}: {candidate.reason}" for candidate in own)
    others = f" (passed over: {passed_over})" if passed_over else ""
    return (
        f"no module for spec {spec} on {device.slug} in {looked}{others}, and no compiler to build "
        f"one; run {installing('tune')}, or `deft-tvm build --spec {spec}` on a "
        f"machine that has it and name the module's folder in {env.MODULE_PATH.name}"
    )


def _device_here(manifest: Manifest) -> DeviceProfile:
    import torch

    on_gpu = manifest.device_kind == "cuda" and torch.cuda.is_available()
    return DeviceProfile.detect("cuda" if on_gpu else "cpu")


@cache
def _load_module(directory: Path, sha256: str, needs: tuple[str, ...], spec: str) -> tvm_ffi.Module:
    """Load once per process and content."""
    path = check_whole(directory, sha256, spec)
    if "tvm_runtime" in needs:
        _load_tvm_runtime(path)
    with _own_name(path) as name:
        module = tvm_ffi.load_module(name)
        if read_manifest(directory).sha256 != sha256:
            raise ArtifactError(f"{directory} was replaced while it was loaded: load it again")
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

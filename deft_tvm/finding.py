"""Which of the modules on this machine is the one for a spec and a device, and why not the others.

Only manifests are read here; `deft_tvm.artifact` loads what was chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from deft_tvm import env
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import ArtifactError
from deft_tvm.files import AnyPath
from deft_tvm.manifest import (
    MANIFEST,
    Manifest,
    cache_root,
    check_whole,
    read_manifest,
    refuse,
)
from deft_tvm.spec import AttentionSpec

#: Packages that ship modules name here a folder, or a function that returns one.
ENTRY_POINTS = "deft_tvm.modules"

_ONLY = "the only one that fits"
#: By each field of a rank: why a module was taken, and why another was not.
_REASONS = (
    ("in a folder that the user named", "not in a folder that the user named"),
    ("built for this device", "built for another device"),
    ("tuned", "default decisions, and there is a tuned one"),
    ("the newest", "older"),
    ("the last by name of those as good", "as good as the one taken"),
)
_Rank = tuple[bool, bool, bool, str, Path]


@dataclass(frozen=True)
class Place:
    """A folder where modules are looked for.

    Attributes:
        folder: it need not exist.
        origin: what says to look there.
        by_user: the user does, and so its modules go before others.
    """

    folder: Path
    origin: str
    by_user: bool = False


@dataclass(frozen=True)
class Candidate:
    """A module that was found.

    Attributes:
        directory: its folder.
        place: where it was found.
        manifest: what it says of itself; None where that cannot be read.
        taken: it is the one to load; at most one of them all is.
        reason: why it is taken, or passed over.
    """

    directory: Path
    place: Place
    manifest: Manifest | None = None
    taken: bool = False
    reason: str = ""

    def damage(self) -> str:
        """Why its file is refused when it is loaded, which alone reads it; empty if it is whole."""
        try:
            if self.manifest is not None:
                check_whole(self.directory, self.manifest.sha256, self.manifest.spec)
        except ArtifactError as error:
            return str(error)
        return ""


def search_path(path: AnyPath | None = None) -> list[Place]:
    """Where modules are looked for: `path`, the environment, packages, the user's cache."""
    given = [] if path is None else [Place(Path(path), "path", by_user=True)]
    environment = (Place(folder, env.MODULE_PATH.name, True) for folder in env.MODULE_PATH.get())
    return [*given, *environment, *_from_packages(), Place(cache_root(), "the user's cache")]


def candidates(
    spec: AttentionSpec, device: DeviceProfile, path: AnyPath | None = None
) -> list[Candidate]:
    """All modules on the search path, in its order, and which of them is taken.

    Folders that the user named (`path`, ``DEFT_TVM_MODULE_PATH``) go before others; then a module
    for this very device before one that merely runs on it, a tuned one before a default, the newest
    first.
    """
    judged = [_judge(found, spec, device) for found in artifacts(search_path(path))]
    best_first = sorted((rank for _, rank in judged if rank), reverse=True)
    return [
        replace(found, taken=rank == best_first[0], reason=_reason(rank, best_first))
        if rank
        else found
        for found, rank in judged
    ]


def artifacts(places: Sequence[Place]) -> Iterator[Candidate]:
    """Artifacts that are a place's folder, or one or two folders below it (device, spec).

    Hidden folders are artifacts that are being written.
    """
    seen: set[Path] = set()
    for place in places:
        for pattern in (MANIFEST, f"[!.]*/{MANIFEST}", f"[!.]*/[!.]*/{MANIFEST}"):
            for file in sorted(place.folder.glob(pattern)):
                if file.parent not in seen:
                    seen.add(file.parent)
                    yield Candidate(file.parent, place)


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


def _judge(
    found: Candidate, spec: AttentionSpec, device: DeviceProfile
) -> tuple[Candidate, _Rank | None]:
    """With its manifest, and its rank if it fits; if it does not, with the reason."""
    try:
        manifest = read_manifest(found.directory)
        found = replace(found, manifest=manifest)
        check_fits(found.directory, manifest, device, spec)
    except ArtifactError as error:
        reason = str(error).replace(str(found.directory / MANIFEST), MANIFEST)
        return replace(found, reason=reason), None
    if manifest.tuned and env.UNTUNED.get():
        return replace(found, reason=f"tuned, and {env.UNTUNED.name} is set"), None
    own = manifest.device == device.slug
    return found, (found.place.by_user, own, manifest.tuned, manifest.created, found.directory)


def _reason(rank: _Rank, best_first: Sequence[_Rank]) -> str:
    """Where the taken one differs from the next best, any other from the taken one."""
    best, *others = best_first
    if rank != best:
        return _REASONS[_difference(rank, best)][1]
    return _REASONS[_difference(rank, others[0])][0] if others else _ONLY


def _difference(a: _Rank, b: _Rank) -> int:
    """The first field in which two ranks differ."""
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def _from_packages() -> Iterator[Place]:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            value = entry.load()
            folder = Path(value() if callable(value) else value)
        except Exception as error:  # a broken package must not hide the modules of others
            warnings.warn(f"entry point {entry.value!r} of {ENTRY_POINTS}: {error}", stacklevel=2)
        else:
            yield Place(folder, f"entry point {entry.value}")

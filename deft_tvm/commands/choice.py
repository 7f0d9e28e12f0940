"""Which module a spec gets on this device and why, as ``deft-tvm info --spec`` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from deft_tvm import env
from deft_tvm.commands.common import is_installed
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError, installing
from deft_tvm.spec import AttentionSpec

if TYPE_CHECKING:
    from deft_tvm.finding import Candidate


@dataclass(frozen=True)
class Found:
    """A module: whether it is taken, why or why not, and what is wrong with its file."""

    path: Path
    taken: bool
    reason: str
    damage: str


@dataclass(frozen=True)
class Looked:
    """A folder of the search path, what says to look there, and the modules in it."""

    origin: str
    folder: Path
    modules: list[Found]


@dataclass(frozen=True)
class Default:
    """What is built where no module is taken: by which decisions, and whether it will be."""

    decisions: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The search path in its order, and the default at its end."""

    places: list[Looked]
    default: Default


def choose(spec: AttentionSpec, device: DeviceProfile) -> Choice:
    """What `deft_tvm.artifact.find` will do for `spec` on `device`; nothing is loaded or built."""
    from deft_tvm.finding import candidates, search_path

    found = candidates(spec, device)
    places = [
        Looked(
            place.origin,
            place.folder,
            [_found(candidate, spec) for candidate in found if candidate.place == place],
        )
        for place in dict.fromkeys(search_path())
    ]
    needed = not any(candidate.taken for candidate in found)
    return Choice(places, _default(spec, device, needed))


def _found(candidate: Candidate, spec: AttentionSpec) -> Found:
    own = candidate.manifest is not None and candidate.manifest.spec == str(spec)
    damage = candidate.damage() if own else ""
    return Found(candidate.directory, candidate.taken, candidate.reason, damage)


def _default(spec: AttentionSpec, device: DeviceProfile, needed: bool) -> Default:
    from deft_tvm.tuning.log import best_of, find_logs

    try:
        best = {} if env.UNTUNED.get() else best_of(find_logs(spec, device))
    except LogError as error:
        return Default("a log that cannot be read", False, str(error))
    folders = list(dict.fromkeys(str(log.directory) for log, _ in best.values()))
    decisions = f"the log {' and the log '.join(folders)}" if folders else "the defaults that ship"
    if not needed:
        return Default(decisions, False, "not needed")
    if not is_installed("tvm"):
        return Default(decisions, False, f"no compiler to build it; run {installing('tune')}")
    return Default(decisions, True, "nothing else fits; built and kept when it is first used")


def tell(spec: str, choice: Choice, out: Console) -> None:
    """As text."""
    out.print(f"\na module of {spec} is looked for in")
    for place in choice.places:
        out.print(f"{place.folder} ({place.origin}){'' if place.modules else ': nothing'}")
        for module in place.modules:
            out.print(f"    {module.path}\n        {_judgement(module.taken, module.reason)}")
            if module.damage:
                out.print(f"        but {module.damage}")
    default = choice.default
    out.print(f"a module built from {default.decisions}")
    out.print(f"        {_judgement(default.taken, default.reason)}")


def _judgement(taken: bool, reason: str) -> str:
    return f"{'taken' if taken else 'passed over'}: {reason}"

"""Workloads by name, as users type them and logs keep them.

    few_shot:prompt=4000,branches=32,tokens=64,vary=0
    recorded:path=/some/trees.json,request=1,step=40,prompt=1000

The first is a function of `families` with its arguments, the second one step of a request that was
recorded while a model decoded (`recorded`).

>>> workload = parse("multi_step:levels=2")
>>> workload.name
'multi_step:root=1200,levels=2,width=10,tokens=300'
>>> workload.forest
Forest(nodes=12, trees=1, levels=3, tokens=4500, rows=10)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deft_tvm.errors import WorkloadError
from deft_tvm.workloads.families import FAMILIES, Workload
from deft_tvm.workloads.recorded import PROMPT, load_recorded

RECORDED = "recorded"
_RECORDED_ARGUMENTS = ("path", "request", "step", "prompt")

#: What a command says of the workloads that it takes.
HELP = (
    f"{', '.join(FAMILIES)}, with arguments as in few_shot:prompt=1000 or "
    "speculative:nodes=64,context=4000; or a tree recorded while a model decoded, "
    f"{RECORDED}:path=FILE, of the file's first request in the step with the most rows, or as in "
    f"{RECORDED}:path=FILE,request=2,step=40 (prompt=: tokens before a file's first draft)"
)


def parse(text: str) -> Workload:
    """The workload of a string: a name, then ``:`` and any of its arguments.

    Raises:
        WorkloadError: no such name or argument, a value that is not a whole number in range, an
            argument given twice, or a file that `load_recorded` refuses.
    """
    name, _, body = text.partition(":")
    if name == RECORDED:
        return _recorded(text, body)
    if name not in FAMILIES:
        names = ", ".join((*FAMILIES, RECORDED))
        raise WorkloadError(f"workload {text!r} starts with {name!r}; expected one of {names}")
    family = FAMILIES[name]
    arguments = {p.name: p.default for p in inspect.signature(family).parameters.values()}
    given = _arguments(text, body.split(","), tuple(arguments))
    arguments |= {key: _number(text, key, value) for key, value in given.items()}
    description = (inspect.getdoc(family) or "").partition("\n")[0]
    return Workload(_spelled(name, arguments), family(**arguments), description)


def _recorded(text: str, body: str) -> Workload:
    """One step of a recorded request: by default the first's, and where it is widest."""
    # A path may have commas, if no argument seems to begin behind them.
    given = _arguments(text, re.split(r",(?=\w+=)", body), _RECORDED_ARGUMENTS)
    if not given.get("path"):
        raise WorkloadError(f"workload {text!r} has no path; expected {RECORDED}:path=FILE")
    # Absolute, as a name in a log means the same wherever the command is run.
    try:
        path = Path(given.pop("path")).expanduser().absolute()
    except RuntimeError as error:
        raise WorkloadError(f"workload {text!r}: {error}; expected a path") from None
    numbers = {key: _number(text, key, value) for key, value in given.items()}
    request, prompt = numbers.get("request", 1), numbers.get("prompt", PROMPT)
    recordings = load_recorded(path, prompt)
    if request > len(recordings):
        raise WorkloadError(
            f"workload {text!r}: request is {request}; expected one of the file's complete ones, "
            f"of which there are {len(recordings)}"
        )
    recording = recordings[request - 1]
    step = numbers.get("step", recording.widest)
    found = recording.at(step)
    arguments = {"path": path, "request": request, "step": step, "prompt": prompt}
    return Workload(_spelled(RECORDED, arguments), found.forest, found.description)


def _arguments(text: str, parts: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in filter(None, parts):
        key, _, value = part.partition("=")
        if key not in known or key in given:
            raise WorkloadError(
                f"workload {text!r} has {part!r}; expected each of {', '.join(known)} at most once"
            )
        given[key] = value
    return given


def _number(text: str, key: str, value: str) -> int:
    least = 0 if key == "vary" else 1
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise WorkloadError(
            f"workload {text!r}: {key} is {value!r}; expected a whole number from {least} on"
        )
    return int(value)


def _spelled(name: str, arguments: Mapping[str, object]) -> str:
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in arguments.items())

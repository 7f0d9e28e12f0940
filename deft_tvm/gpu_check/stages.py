"""The stages, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deft_tvm.errors import InputError


class Stage(NamedTuple):
    """A Python module that is run with ``--device``, and prints what it found.

    Attributes:
        name: by which it is asked for.
        what: it does, in a few words.
        module: ``python -m`` runs it.
        resumes: it takes ``--out``, ``--minutes`` and ``--again`` too, keeps what it finds line by
            line in that folder, and goes on after the lines that are there.
    """

    name: str
    what: str
    module: str
    resumes: bool = False


def _own(name: str, what: str, module: str | None = None) -> Stage:
    return Stage(name, what, f"deft_tvm.gpu_check.{module or name}", resumes=True)


STAGES = (
    _own("build", "modules of all attentions, many at once", "modules"),
    _own("rates", "bandwidths, matrix rates and launches of the device"),
    _own("exact", "every attention, tree and way to call it beside float64"),
    _own("sanitize", "kernels under NVIDIA's compute-sanitizer"),
    _own("tune", "the best decisions for this device"),
    _own("bench", "one step of ours beside its peers and the device's limits"),
    Stage(
        "decode",
        "whole decodings of SmolLM2 beside transformers",
        "deft_tvm.demo.smollm2.end_to_end",
    ),
)


def chosen(names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """The stages of these names, in their own order; all of them where none is named.

    Raises:
        InputError: there is no such stage.
    """
    known = {stage.name: stage for stage in stages}
    for name in names:
        if name not in known:
            raise InputError(f"stage is {name!r}; expected one of {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]

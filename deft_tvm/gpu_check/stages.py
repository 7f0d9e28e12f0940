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
    """

    name: str
    what: str
    module: str


STAGES = (
    Stage("rates", "bandwidth and matrix rates of the device", "deft_tvm.gpu_check.rates"),
    Stage("exact", "one step of every attention beside float64", "deft_tvm.gpu_check.exact"),
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

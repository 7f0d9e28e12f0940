"""The job for one dtype: tune where there is no log, export, load, decode, compare, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from deft_tvm.artifact import find
from deft_tvm.bench import Measurement, measure
from deft_tvm.check import Exactness, check
from deft_tvm.commands.progress import shown
from deft_tvm.demo.decode import (
    DECODE_STEPS,
    Cache,
    decode_each,
    decode_tree,
    prefill,
    rounding_nudge,
)
from deft_tvm.demo.model import Shape, Transformer
from deft_tvm.demo.text import FewShot
from deft_tvm.device import DeviceProfile
from deft_tvm.dtypes import Dtype
from deft_tvm.peers import SDPA
from deft_tvm.pytorch import load
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.log import TuningLog, writable_root

TRIALS = 10
TUNED_ON = "few_shot:prompt=4000,branches=32,tokens=56,vary=40"
"""A workload by name with the demo's mixture of lengths."""

EVERY = 4
"""One branch in so many is decoded with perturbed attention, to see what rounding can do."""


class Outcome(msgspec.Struct, frozen=True):
    """What the job found.

    Attributes:
        dtype: of the model and its cache.
        attention: errors of the last step's attention, the worst over layers.
        logits_error: largest difference between decoding as a tree and each branch by SDPA.
        logits_bound: as large as rounding in attention explains.
        measurement: latency of one attention step, and what it moves.
        log: where trials were written, or were found.
        module: the exported module.
    """

    dtype: str
    attention: Exactness
    logits_error: float
    logits_bound: float
    measurement: Measurement
    log: str
    module: str

    @property
    def holds(self) -> bool:
        """Everything is as exact as it must be."""
        return self.attention.holds and self.logits_error <= self.logits_bound


def run(
    text: FewShot,
    shape: Shape,
    dtype: Dtype,
    trials: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> Outcome:
    """Everything from tuning to the measurement.

    Args:
        text: prompt and branches.
        shape: of the model.
        dtype: of its weights and cache.
        trials: that the log shall hold; None: tune only where there is no log.
        seconds: to spend on measuring.
        say: told of each part before it begins.
    """
    spec = shape.spec(dtype)
    log, module = tuned(spec, trials)
    attention = load(module)
    with torch.inference_mode():
        model = Transformer(shape).to(getattr(torch, dtype))
        say(f"{dtype}: reading the prompt")
        cache = prefill(model, text, spec)
        say(f"{dtype}: decoding all branches as a tree, {DECODE_STEPS} steps")
        decoded = decode_tree(model, text, cache, attention)
        say(f"{dtype}: decoding each branch by itself")
        by_sequence = decode_each(model, text.branches, cache)
        bound = _explained(model, text, cache, spec, by_sequence)
    say(f"{dtype}: comparing with float64")
    errors = [check(case, attention) for case in decoded.cases]
    say(f"{dtype}: measuring")
    measurement = measure("the text's last step", decoded.cases[0], attention, SDPA, budget=seconds)
    return Outcome(
        dtype,
        max(errors, key=lambda found: found.out_error / found.out_bound),
        _apart(decoded.logits, by_sequence),
        bound,
        measurement,
        str(log.path),
        str(module),
    )


def tuned(spec: AttentionSpec, trials: int | None) -> tuple[TuningLog, Path]:
    """The user's own log of `spec` on this machine, and a module built from it; both made at first.

    A log that ships for such a machine does not count: the demo shows how one is made.
    """
    device = DeviceProfile.detect()
    log = TuningLog(writable_root() / device.slug / spec.slug)
    if log.exists() and trials is None and _finished(log):
        return log, _module(spec, device)
    with shown(str(spec)) as listener:
        from deft_tvm.build import build
        from deft_tvm.tuning.tune import tune

        (found,) = tune([spec], [TUNED_ON], trials=trials or TRIALS, apart=0.0, listener=listener)
        return found.log, build(spec)


def _finished(log: TuningLog) -> bool:
    """Winners have been measured again; else the tuning was killed, and goes on."""
    return any(trial.alone for trial in log.read())


def _module(spec: AttentionSpec, device: DeviceProfile) -> Path:
    """A module of the device's log, also where a default was cached before there was one."""
    found = find(spec, device)
    if found.manifest.tuned:
        return found.directory
    from deft_tvm.build import build

    return build(spec, device)


def _explained(
    model: Transformer, text: FewShot, cache: Cache, spec: AttentionSpec, logits: list[Tensor]
) -> float:
    """How far logits move when every attention is off by what rounding explains."""
    nudge = rounding_nudge(spec)
    return _apart(logits[::EVERY], decode_each(model, text.branches[::EVERY], cache, nudge))


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)

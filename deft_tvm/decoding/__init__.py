"""Decoding of trees: a control says each step which branches go on, split or end.

`decode` is the loop, over a model and a `deft_tvm.PagedKVCache`. Controls that are there: `greedy`,
`Sampling`, `BeamSearch`, `Shots`; any callable from live branches and logits to `Next` is one.
"""

from __future__ import annotations

from deft_tvm.decoding.beam import BeamSearch
from deft_tvm.decoding.branch import Branch, Control, Next, best
from deft_tvm.decoding.loop import Decoding, Observe, decode
from deft_tvm.decoding.model import Model
from deft_tvm.decoding.sampling import Sampling, greedy
from deft_tvm.decoding.shots import Shots
from deft_tvm.decoding.warp import Warp

__all__ = [
    "BeamSearch",
    "Branch",
    "Control",
    "Decoding",
    "Model",
    "Next",
    "Observe",
    "Sampling",
    "Shots",
    "Warp",
    "best",
    "decode",
    "greedy",
]

"""Decoding of trees: a control says each step which branches go on, split or end.

`decode` is the loop, over a model and a `deft_tvm.PagedKVCache`. Controls that are there: `greedy`,
`Sampling`, `BeamSearch`, `Thoughts`, `Shots`, `Replay`; any callable from live branches and logits
to `Next` is one. `speculate` decodes one sequence a prompt, with drafts that the model verifies.
"""

from __future__ import annotations

from deft_tvm.decoding.accept import Accept, Accepted, Lossless, match
from deft_tvm.decoding.beam import BeamSearch
from deft_tvm.decoding.branch import Branch, Control, Next, best
from deft_tvm.decoding.drafts import Draft, Drafter
from deft_tvm.decoding.loop import Decoding, Observe, decode
from deft_tvm.decoding.model import Model
from deft_tvm.decoding.ngrams import NGramDrafter
from deft_tvm.decoding.replay import Replay
from deft_tvm.decoding.sampling import Sampling, greedy
from deft_tvm.decoding.shots import Shots
from deft_tvm.decoding.speculative import Speculated, speculate
from deft_tvm.decoding.thoughts import Evaluate, Thought, Thoughts
from deft_tvm.decoding.warp import Warp

__all__ = [
    "Accept",
    "Accepted",
    "BeamSearch",
    "Branch",
    "Control",
    "Decoding",
    "Draft",
    "Drafter",
    "Evaluate",
    "Lossless",
    "Model",
    "NGramDrafter",
    "Next",
    "Observe",
    "Replay",
    "Sampling",
    "Shots",
    "Speculated",
    "Thought",
    "Thoughts",
    "Warp",
    "best",
    "decode",
    "greedy",
    "match",
    "speculate",
]

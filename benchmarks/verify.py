# python benchmarks/verify.py
"""One verification step of SmolLM2: a draft of 64 nodes below 1,000 tokens, in float32.

As a tree, and by one call of transformers with a dense mask over cache and draft: by SDPA as
transformers calls it, which repeats KV heads where there is a mask, and as it can be told to call
it, which does not. Counted as attention are the plan, writing or appending KV, and attending;
making the mask is not, nor copying what was kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from deft_tvm.decoding import NGramDrafter
from deft_tvm.demo.smollm2 import plain
from deft_tvm.demo.smollm2.end_to_end import OURS, Bench
from deft_tvm.integrations.huggingface import NAME
from deft_tvm.pool import ROOT
from deft_tvm.timing import Summary

CONTEXT, NODES, ROUNDS = 1000, 64, 15


class Step:
    """One way to verify; seconds of each round, of all of it and of attention."""

    def __init__(self, bench: Bench, run: Callable[[], torch.Tensor]) -> None:
        self.clock, self.run = bench.clock, run
        self.whole: list[float] = []
        self.attention: list[float] = []

    def round(self) -> torch.Tensor:
        self.clock.restart()
        began = time.perf_counter()
        logits = self.run()
        self.whole.append(time.perf_counter() - began)
        self.attention.append(self.clock.seconds["attention"] + self.clock.seconds["plan"])
        return logits


def tree_step(bench: Bench, context: list[int], draft: list[int], parents: list[int]) -> Step:
    cache = bench.model.new_cache((len(context) + NODES) // 16 + 2)
    branch = cache.pool.root()
    nothing = torch.zeros(0, dtype=torch.int64)
    bench.model(torch.tensor(context), cache.step({branch: len(context)}), nothing)
    tokens, every = torch.tensor(draft), torch.arange(len(draft))

    def run() -> torch.Tensor:
        bench.net.set_attn_implementation(NAME)
        with bench.clock.watching(*OURS):
            logits = bench.model(tokens, cache.step({}, {branch: parents}), every)
            cache.pool.accept(branch, [])
        return logits

    return Step(bench, run)


def dense_step(
    bench: Bench, context: list[int], draft: list[int], parents: list[int], gqa: bool
) -> Step:
    cache = DynamicCache(config=bench.net.config)
    bench.net.set_attn_implementation("sdpa")
    bench.net(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)

    def run() -> torch.Tensor:
        os.environ[plain.GROUPED] = str(int(gqa))
        with plain.on_the_clock(bench.clock, bench.net):
            logits = plain.verify(bench.net, cache, draft, parents)
            plain.keep(cache, len(context), [])
        return logits

    return Step(bench, run)


def told(samples: Sequence[float]) -> str:
    found = Summary.of(tuple(samples))
    return f"{1e3 * found.median:8.1f} ({1e3 * found.low:.1f} to {1e3 * found.high:.1f})"


@torch.inference_mode()
def main() -> None:
    bench = Bench()
    context = bench.text(CONTEXT)
    guessed = NGramDrafter(nodes=NODES - 1)(context)
    draft = [context[-1], *guessed.tokens]
    parents = [ROOT, *(parent + 1 for parent in guessed.parents)]
    given = (bench, context, draft, parents)
    steps = {
        "as a tree": tree_step(*given),
        "dense mask, KV heads repeated": dense_step(*given, gqa=False),
        "dense mask, grouped queries": dense_step(*given, gqa=True),
    }
    for _ in range(ROUNDS + 1):
        logits = [step.round() for step in steps.values()]
    tree, *others = logits
    apart = max(float((tree - other).abs().max()) for other in others)
    print(f"{len(draft)} rows below {CONTEXT} tokens; logits at most {apart:.1e} apart\n")
    print(f"{'ms':32}{'attention':>24}{'whole step':>28}")
    ours = steps["as a tree"]
    for name, step in steps.items():
        print(f"{name:32}{told(step.attention[1:]):>24}{told(step.whole[1:]):>28}")
    for name, step in steps.items():
        if step is not ours:
            ratios = [
                Summary.of(tuple(b / a for a, b in zip(one[1:], other[1:], strict=True)))
                for one, other in ((ours.attention, step.attention), (ours.whole, step.whole))
            ]
            line = "".join(f"{r.median:17.2f}× ({r.low:.2f} to {r.high:.2f})" for r in ratios)
            print(f"{'beside ' + name:32}{line}")


if __name__ == "__main__":
    main()

"""Whole decodings of SmolLM2, everything counted: trees beside transformers with SDPA.

``python -m deft_tvm.demo.smollm2.end_to_end``: in float32 on a CPU, in bfloat16 on a GPU.
transformers is called as a careful caller does: a prompt is read once and its KV copied for each
sequence; drafts are verified by one call with a dense mask.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from deft_tvm.cli import end_with_code
from deft_tvm.decoding import NGramDrafter, Replay, Sampling
from deft_tvm.demo.smollm2 import ours, plain, prompts, weights
from deft_tvm.demo.smollm2.clock import Clock
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.errors import WorkloadError
from deft_tvm.integrations.huggingface import HuggingFaceModel
from deft_tvm.pool import PagePool
from deft_tvm.pytorch import PagedKVCache, Step
from deft_tvm.workloads import load_recorded
from deft_tvm.workloads.recorded import Node, RecordedTree

PROMPT, BRANCHES, BEAMS, TOKENS = 4000, 32, 8, 64
CONTEXT, NODES, DRAFTED = 1000, 64, 128
ROUNDS = 2
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
OURS = (
    (PagedKVCache, "step", "plan"),
    (PagePool, "fork", "plan"),
    (PagePool, "prune", "plan"),
    (PagePool, "accept", "plan"),
    (Step, "attend", "attention"),
)


class Timed(NamedTuple):
    """A decoding, and where its time went."""

    decoded: Decoded
    seconds: dict[str, float]

    @property
    def shares(self) -> str:
        total = self.decoded.seconds
        parts = {part: self.seconds.get(part, 0.0) for part in ("attention", "plan")}
        parts["rest"] = total - sum(parts.values())
        return ", ".join(f"{part} {100 * spent / total:.1f} %" for part, spent in parts.items())


class Workload(NamedTuple):
    """A decoding in both ways."""

    name: str
    tree: Callable[[], Decoded]
    plain: Callable[[], Decoded]


class Bench:
    """The model in both ways, and one clock for both."""

    def __init__(self, device: str = "cpu") -> None:
        self.net, self.tokenizer = weights.load(DTYPES[device])
        self.net.to(torch.device(device))
        if device == "cpu":  # faster there with a mask, see `benchmarks/verify.py`
            os.environ[plain.GROUPED] = "1"
        # All sequences are as long as they may be.
        self.net.generation_config.eos_token_id = None
        self.net.generation_config.pad_token_id = self.tokenizer.eos_token_id
        self.model = HuggingFaceModel(self.net)
        self.clock = Clock(torch.cuda.synchronize if device == "cuda" else None)

    def text(self, length: int) -> list[int]:
        """So many tokens of the Declaration of Independence, again and again."""
        text = resources.files("deft_tvm.demo").joinpath("declaration.txt").read_text("utf-8")
        tokens = prompts.tokens(self.tokenizer, text)
        return (tokens * -(-length // len(tokens)))[:length]

    def few_shot(self) -> Workload:
        prompt = self.text(PROMPT)
        cache = self.model.new_cache(PROMPT // 16 + BRANCHES * (TOKENS // 16 + 2))

        def tree() -> Decoded:
            torch.manual_seed(0)
            return ours.samples(
                self.model, cache, prompt, Sampling(BRANCHES, top_k=50, max_tokens=TOKENS)
            )

        def other() -> Decoded:
            torch.manual_seed(0)
            options = {"do_sample": True, "num_return_sequences": BRANCHES, "top_k": 50}
            return self._generate(prompt, BRANCHES, **options)

        return Workload(f"few_shot, {PROMPT} + {BRANCHES} × {TOKENS}, samples", tree, other)

    def beams(self) -> Workload:
        prompt = self.text(PROMPT)
        options = {"num_beams": BEAMS, "num_return_sequences": BEAMS}
        return Workload(
            f"few_shot, {PROMPT} + {BEAMS} beams of {TOKENS}",
            lambda: ours.generated(self.net, prompt, max_new_tokens=TOKENS, **options),
            lambda: self._generate(prompt, BEAMS, **options),
        )

    def multi_step(self, path: Path | None, last: int | None) -> Workload:
        tree = searched() if path is None else first_tree(path)
        replay = Replay(tree, last=last)
        prompt = self.text(replay.prompt_length)
        cache = self.model.new_cache(1024)
        return Workload(
            f"multi_step, {tree.name}, {replay.last} steps",
            lambda: ours.controlled(self.model, cache, prompt, replay)[0],
            lambda: plain.replayed(self.net, tree.nodes, tree.parents, replay.last, prompt),
        )

    def speculative(self) -> Workload:
        prompt = self.text(CONTEXT)
        cache = self.model.new_cache((CONTEXT + DRAFTED + NODES) // 16 + 8)
        drafter = NGramDrafter(nodes=NODES - 1)
        return Workload(
            f"speculative, {NODES} nodes below {CONTEXT}",
            lambda: ours.drafted(self.model, cache, prompt, drafter, max_tokens=DRAFTED),
            lambda: plain.speculated(self.net, prompt, drafter, DRAFTED),
        )

    def _generate(self, prompt: Sequence[int], copies: int, **options: Any) -> Decoded:
        return plain.generated(
            self.net, prompt, copies, read_once=True, max_new_tokens=TOKENS, **options
        )

    def run(self, workload: Workload) -> None:
        """Both ways in turn, and a few lines on what they took."""
        trees, others = [], []
        for _ in range(ROUNDS):
            with self.clock.watching(*OURS):
                trees.append(self._timed(workload.tree))
            with plain.on_the_clock(self.clock, self.net):
                others.append(self._timed(workload.plain))
        tree, other = trees[-1].decoded, others[-1].decoded
        ratios = [
            b.decoded.seconds / a.decoded.seconds * a.decoded.tokens / b.decoded.tokens
            for a, b in zip(trees, others, strict=True)
        ]
        print(workload.name)
        print(f"  tokens                   {tree.tokens}, {same(tree, other)}")
        for name, timed in (("as a tree", trees), ("transformers", others)):
            rates = [t.decoded.per_second for t in timed]
            print(f"  {name:12} tokens/s    {median(rates):8.1f}  ({spread(rates)})")
            print(f"  {'':12} time        {timed[-1].shares}")
            print(f"  {'':12} KV held     {timed[-1].decoded.kv_held / 2**20:8.1f} MiB")
        print(f"  tokens a second          {median(ratios):8.2f}×  ({spread(ratios)})")
        print(f"  KV held                  {other.kv_held / tree.kv_held:8.2f}× less\n", flush=True)

    def _timed(self, decode: Callable[[], Decoded]) -> Timed:
        self.clock.restart()
        decoded = decode()
        return Timed(decoded, dict(self.clock.seconds))


def same(tree: Decoded, other: Decoded) -> str:
    """Whether both came to the same."""
    equal = sum(a == b for a, b in zip(tree.texts, other.texts, strict=True))
    return f"{equal} of {len(tree.texts)} sequences the same in both"


def spread(values: Sequence[float]) -> str:
    return " to ".join(f"{value:.2f}" for value in (min(values), max(values)))


def first_tree(path: Path) -> RecordedTree:
    """Of a file of recorded trees."""
    trees = (tree for tree in load_recorded(path) if isinstance(tree, RecordedTree))
    if (found := next(trees, None)) is None:
        raise WorkloadError(f"{path} has no tree that branches; expected one of reasoning")
    return found


def searched(
    prompt: int = 1000, levels: int = 6, width: int = 10, tokens: int = 50
) -> RecordedTree:
    """A tree as searches in breadth leave it: on each level many thoughts below one of the last.

    Args:
        prompt: tokens of the root.
        levels: below it.
        width: thoughts on each of them.
        tokens: of each thought.
    """
    nodes, parents = [Node(0, prompt, 1 - prompt, 0, [])], [-1]
    for level in range(levels):
        begin, above = level * tokens + 1, len(nodes) - 1
        for _ in range(width):
            nodes.append(Node(len(nodes), tokens, begin, begin + tokens - 1, []))
            parents.append(above)
    return RecordedTree("a search in breadth", tuple(nodes), tuple(parents))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--trees", type=Path, help="recorded trees; by default a made-up one")
    parser.add_argument("--last", type=int, help="step of it with which to end")
    parser.add_argument("--only", choices=("few_shot", "beams", "speculative", "multi_step"))
    asked = parser.parse_args()
    bench = Bench(asked.device)
    makers = {
        "few_shot": bench.few_shot,
        "beams": bench.beams,
        "speculative": bench.speculative,
        "multi_step": lambda: bench.multi_step(asked.trees, asked.last),
    }
    for name, make in makers.items():
        if asked.only in (None, name):
            bench.run(make())


if __name__ == "__main__":
    end_with_code(main)

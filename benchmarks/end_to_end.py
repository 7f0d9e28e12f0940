# python benchmarks/end_to_end.py --trees keyword.json
"""Whole decodings of a real model, everything counted: trees beside transformers with SDPA.

SmolLM2-135M in float32. transformers is called as a careful caller does: a prompt is read once and
its KV copied for each sequence; drafts are verified by one call with a dense mask.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from deft_tvm.decoding import NGramDrafter, Replay, Sampling, match
from deft_tvm.demo.smollm2 import ours, plain, prompts, weights
from deft_tvm.demo.smollm2.clock import Clock
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.integrations.huggingface import HuggingFaceModel
from deft_tvm.pool import ROOT, PagePool
from deft_tvm.pytorch import PagedKVCache, Step
from deft_tvm.workloads import load_recorded
from deft_tvm.workloads.recorded import RecordedTree

PROMPT, BRANCHES, BEAMS, TOKENS = 4000, 32, 8, 64
CONTEXT, NODES, DRAFTED = 1000, 64, 128
ROUNDS = 2
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

    def __init__(self) -> None:
        self.net, self.tokenizer = weights.load(torch.float32)
        # All sequences are as long as they may be.
        self.net.generation_config.eos_token_id = None
        self.net.generation_config.pad_token_id = self.tokenizer.eos_token_id
        self.model = HuggingFaceModel(self.net)
        self.clock = Clock()

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

    def multi_step(self, path: Path, last: int | None) -> Workload:
        tree = next(t for t in load_recorded(path) if isinstance(t, RecordedTree))
        replay = Replay(tree, last=last)
        prompt = self.text(replay.prompt_length)
        cache = self.model.new_cache(1024)
        return Workload(
            f"multi_step, {tree.name}, {replay.last} steps",
            lambda: ours.controlled(self.model, cache, prompt, replay)[0],
            lambda: replay_plain(self.net, tree, replay.last, prompt),
        )

    def speculative(self) -> Workload:
        prompt = self.text(CONTEXT)
        cache = self.model.new_cache((CONTEXT + DRAFTED + NODES) // 16 + 8)
        drafter = NGramDrafter(nodes=NODES - 1)
        return Workload(
            f"speculative, {NODES} nodes below {CONTEXT}",
            lambda: ours.drafted(self.model, cache, prompt, drafter, max_tokens=DRAFTED),
            lambda: speculate_plain(self.net, prompt, drafter, DRAFTED),
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


def replay_plain(net: Any, tree: RecordedTree, last: int, prompt: Sequence[int]) -> Decoded:
    """A recorded tree, each live branch a row with a cache of its own.

    A path grows by a token in each step, so that rows are always of one length.
    """
    began = time.perf_counter()
    cache = DynamicCache(config=net.config)
    logits = net(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[:, -1]
    texts: dict[int, list[int]] = {0: []}
    for step in range(1, last + 1):
        grows = [n for n, node in enumerate(tree.nodes) if node.start <= step <= node.end]
        before = list(texts)
        above = [n if n in texts else tree.parents[n] for n in grows]
        ranks = [0 if n in texts else place_below(tree, n) for n in grows]
        rows = torch.tensor([before.index(n) for n in above])
        if grows != before:
            cache.batch_select_indices(rows)
        ranked = logits[rows].topk(max(ranks) + 1).indices
        tokens = [int(ranked[row, rank]) for row, rank in enumerate(ranks)]
        texts = {n: [*texts[a], t] for n, a, t in zip(grows, above, tokens, strict=True)}
        if step < last:
            logits = net(torch.tensor([tokens]).T, past_key_values=cache).logits[:, -1]
    kv = plain.held(cache)
    return Decoded(list(texts.values()), time.perf_counter() - began, kv, kv)


def place_below(tree: RecordedTree, node: int) -> int:
    """How many of its siblings come before a node."""
    return tree.parents[:node].count(tree.parents[node])


def speculate_plain(net: Any, prompt: Sequence[int], drafter: Any, most: int) -> Decoded:
    """The same drafts, each verified by one masked call, and kept by copying."""
    began = time.perf_counter()
    cache = DynamicCache(config=net.config)
    logits = net(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    found, steps = [int(logits.argmax())], 1
    while len(found) < most:
        draft = drafter((*prompt, *found))
        cached = cache.get_seq_length()
        tree = [ROOT, *(parent + 1 for parent in draft.parents)]
        path, token = match(draft, plain.verify(net, cache, [found[-1], *draft.tokens], tree))
        plain.keep(cache, cached, [0, *(number + 1 for number in path)])
        found += [*(draft.tokens[number] for number in path), token]
        steps += 1
    kv = plain.held(cache)
    return Decoded([found[:most]], time.perf_counter() - began, kv, kv, steps)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", type=Path, help="recorded trees, for multi_step")
    parser.add_argument("--last", type=int, help="step of it with which to end")
    parser.add_argument("--only", help="workloads whose name begins so")
    asked = parser.parse_args()
    bench = Bench()
    workloads = [bench.few_shot, bench.beams, bench.speculative]
    if asked.trees is not None:
        workloads.append(lambda: bench.multi_step(asked.trees, asked.last))
    for make in workloads:
        workload = make()
        if asked.only is None or workload.name.startswith(asked.only):
            bench.run(workload)


if __name__ == "__main__":
    main()

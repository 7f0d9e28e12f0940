# python benchmarks/identical.py
"""SmolLM2 in float32, 20 prompts × 64 tokens: are trees and plain transformers token-identical?

Where they are not, the first difference is printed with how far apart the two tokens' logits are in
a pass over the whole text. Both ways round differently, so that a difference is excused where the
two best are within 1e-4. Beams part for another reason, scores that tie: `ties.py` looks for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deft_tvm.decoding import BeamSearch, NGramDrafter, Sampling, best, decode, greedy, speculate
from deft_tvm.demo.smollm2 import ours, plain, prompts, weights
from deft_tvm.integrations.huggingface import HuggingFaceModel
from deft_tvm.workloads.published import EAGLE

TOKENS, SAMPLES, SEED = 64, 4, 7
TEMPERATURE, TOP_K = 0.8, 50
EXCUSED = 1e-4

Texts = list[list[int]]


class Check:
    """The model in both ways."""

    def __init__(self) -> None:
        self.net, self.tokenizer = weights.load(torch.float32)
        self.eos = self.tokenizer.eos_token_id
        self.model = HuggingFaceModel(self.net)
        self.cache = self.model.new_cache(256)

    def generate(self, prompt: Sequence[int], **options: Any) -> Texts:
        """By transformers alone."""
        self.net.set_attn_implementation("sdpa")
        torch.manual_seed(SEED)
        found = plain.generated(
            self.net, prompt, max_new_tokens=TOKENS, pad_token_id=self.eos, **options
        )
        return found.without_padding([self.eos]).texts

    def generate_tree(self, prompt: Sequence[int], **options: Any) -> Texts:
        """By ``generate`` with a tree for its cache."""
        torch.manual_seed(SEED)
        found = ours.generated(
            self.net, prompt, max_new_tokens=TOKENS, pad_token_id=self.eos, **options
        )
        return found.without_padding([self.eos]).texts

    def decode(self, prompt: Sequence[int], control: Any, count: int = 1) -> Texts:
        torch.manual_seed(SEED)
        branches = decode(self.model, self.cache, [prompt], control)
        if isinstance(control, BeamSearch):
            branches = best(branches, count)[0]
        else:
            branches.sort(key=lambda branch: branch.state.row)
        return [list(branch.tokens) for branch in branches]

    def speculate(self, prompt: Sequence[int], drafter: NGramDrafter) -> Texts:
        found = speculate(
            self.model, self.cache, [prompt], drafter, max_tokens=TOKENS, eos=[self.eos]
        )
        return [list(one.tokens) for one in found]

    def apart(self, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> str:
        """Where two texts part, and how near to each other the likeliest tokens are there."""
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        self.net.set_attn_implementation("sdpa")
        logits = self.net(torch.tensor([[*prompt, *one[:place]]]), logits_to_keep=1).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        gap = abs(float(logits[one[place]] - logits[other[place]]))
        verdict = "excused" if first - second < EXCUSED else "DIFFERENT"
        return (
            f"token {place}: logits of the two tokens {gap:.1e} apart, "
            f"of the two best {first - second:.1e}: {verdict}"
        )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(prompts.QUESTIONS))
    asked = parser.parse_args()
    check = Check()
    eos, drawn = [check.eos], {"temperature": TEMPERATURE, "top_k": TOP_K}
    sampled = {"do_sample": True, "num_return_sequences": SAMPLES, **drawn}
    ways: dict[str, tuple[Callable[[list[int]], Texts], dict[str, Any]]] = {
        "greedy": (
            lambda p: check.decode(p, greedy(eos=eos, max_tokens=TOKENS)),
            {"do_sample": False},
        ),
        "a draft tree of 26 nodes": (
            lambda p: check.speculate(p, NGramDrafter(choices=EAGLE)),
            {"do_sample": False},
        ),
        f"{SAMPLES} samples": (
            lambda p: check.decode(p, Sampling(SAMPLES, eos=eos, max_tokens=TOKENS, **drawn)),
            sampled,
        ),
        f"{SAMPLES} samples, generate()": (lambda p: check.generate_tree(p, **sampled), sampled),
    }
    for beams in (4, 8):
        options = {"num_beams": beams, "num_return_sequences": beams}
        ways[f"{beams} beams"] = (
            lambda p, n=beams: check.decode(p, BeamSearch(n, max_tokens=TOKENS, eos=eos), n),
            options,
        )
        ways[f"{beams} beams, generate()"] = (
            lambda p, o=options: check.generate_tree(p, **o),
            options,
        )
    asked_of = prompts.QUESTIONS[: asked.prompts]
    known: dict[tuple[str, str], Texts] = {}
    for name, (tree, options) in ways.items():
        same, texts = 0, 0
        for question in asked_of:
            prompt = prompts.conversation(check.tokenizer, question)
            key = (question, repr(options))
            if key not in known:
                known[key] = check.generate(prompt, **options)
            for row, (one, other) in enumerate(zip(tree(prompt), known[key], strict=True)):
                texts += 1
                same += one == other
                if one != other:
                    print(f"  {name}, {question!r}, row {row}, {check.apart(prompt, one, other)}")
        print(f"{name:28} {same} of {texts} texts the same, {len(asked_of)} prompts", flush=True)


if __name__ == "__main__":
    main()

"""The three jobs of the demo, each as a tree and with plain transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deft_tvm.decoding import NGramDrafter, Sampling
from deft_tvm.demo.smollm2 import ours, plain, prompts
from deft_tvm.demo.smollm2.decoded import Decoded
from deft_tvm.demo.smollm2.weights import Pretrained
from deft_tvm.integrations.huggingface import HuggingFaceModel

SAMPLES, BEAMS = 16, 8
ANSWER_TOKENS, DRAFTED_TOKENS = 40, 80
DRAFT_NODES = 26
TEMPERATURE, TOP_K = 0.8, 50
SEED = 0
PAGES = 128


class Job(NamedTuple):
    """One way to decode, and what both came to.

    Attributes:
        name: what it is.
        prompt: tokens.
        tree: decoded as a tree.
        plain: by transformers alone.
    """

    name: str
    prompt: list[int]
    tree: Decoded
    plain: Decoded

    @property
    def same(self) -> bool:
        """Both came to the same tokens."""
        return self.tree.texts == self.plain.texts


class Bench:
    """Model, cache and tokens that all jobs need.

    Attributes:
        model: the model, as trees drive it.
        cache: of all jobs in turn.
        question: tokens of the few-shot prompt.
        request: tokens of what to repeat.
        eos: tokens that end an answer.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        tokenizer = pretrained.tokenizer
        self.model = HuggingFaceModel(pretrained.model)
        self.cache = self.model.new_cache(PAGES)
        self.question = prompts.tokens(tokenizer, prompts.few_shot())
        self.request = prompts.conversation(tokenizer, prompts.REPEAT)
        (newline,) = prompts.tokens(tokenizer, "\n")
        self.eos = [tokenizer.eos_token_id, newline]

    def plain(self, prompt: list[int], eos: list[int], **options: Any) -> Decoded:
        """By ``generate``, as anybody calls it."""
        self.model.model.set_attn_implementation("sdpa")
        found = plain.generated(self.model.model, prompt, **_ends(eos), **options)
        return found.without_padding(eos)

    def samples(self) -> Job:
        """Self-consistency: many answers to one question (Wang et al. 2023, arXiv 2203.11171)."""
        control = Sampling(
            SAMPLES, temperature=TEMPERATURE, top_k=TOP_K, eos=self.eos, max_tokens=ANSWER_TOKENS
        )
        torch.manual_seed(SEED)
        tree = ours.samples(self.model, self.cache, self.question, control)
        torch.manual_seed(SEED)
        other = self.plain(
            self.question,
            self.eos,
            do_sample=True,
            num_return_sequences=SAMPLES,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_new_tokens=ANSWER_TOKENS,
        )
        return Job(f"{SAMPLES} samples", self.question, tree, other)

    def beams(self) -> Job:
        """Beam search, in both cases by transformers' own."""
        options = {
            "num_beams": BEAMS,
            "num_return_sequences": BEAMS,
            "max_new_tokens": ANSWER_TOKENS,
        }
        tree = ours.generated(self.model.model, self.question, **_ends(self.eos), **options)
        other = self.plain(self.question, self.eos, **options)
        return Job(f"{BEAMS} beams", self.question, tree.without_padding(self.eos), other)

    def drafts(self) -> Job:
        """Speculative decoding by a draft tree, beside greedy decoding."""
        eos = self.eos[:1]
        tree = ours.drafted(
            self.model,
            self.cache,
            self.request,
            NGramDrafter(nodes=DRAFT_NODES - 1),
            max_tokens=DRAFTED_TOKENS,
            eos=eos,
        )
        other = self.plain(self.request, eos, do_sample=False, max_new_tokens=DRAFTED_TOKENS)
        return Job(f"drafts of {DRAFT_NODES} nodes", self.request, tree, other)


def _ends(eos: list[int]) -> dict[str, Any]:
    """For ``generate``: what ends a text, and what fills the rows that have ended."""
    return {"eos_token_id": eos, "pad_token_id": eos[0]}

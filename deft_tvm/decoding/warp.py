"""From logits to the distribution that tokens are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.errors import InputError

COLD = 1e-6
"""Logits divided by a lower temperature could be infinite."""


@dataclass(frozen=True)
class Warp:
    """Temperature, then the most probable tokens, then the nucleus, in this order.

    Attributes:
        temperature: logits are divided by it; with 0 the token of the highest logit is certain.
        top_k: only tokens no less likely than the k-th are left (Fan et al. 2018); 0 is all.
        top_p: of the rest, the least likely tokens whose probabilities together are at most 1 - p
            are left out (the nucleus of Holtzman et al. 2020); 1 is all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises:
        InputError: a number is out of range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected a number from 0 on")
        if whole("top_k", self.top_k, InputError) < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 for all tokens, or how many")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")

    @property
    def certain(self) -> bool:
        """Nothing is left to chance."""
        return self.temperature == 0

    def check_several(self, name: str, count: int) -> None:
        """Refuse to draw several times where all would be the same.

        Args:
            name: of the argument that says how often.
            count: how often.

        Raises:
            InputError: so it is.
        """
        if self.certain and count > 1:
            raise InputError(
                f"{name} is {count} with temperature 0, which makes them all the same; "
                "expected 1, or a higher temperature"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """float32[rows, vocabulary], minus infinity for tokens that are left out."""
        scores = logits.float()
        if self.certain:
            others = torch.full_like(scores, -torch.inf)
            return others.scatter(-1, scores.argmax(-1, keepdim=True), 0.0)
        if self.temperature < COLD:
            scores = scores - scores.amax(-1, keepdim=True)
        scores = scores / max(self.temperature, torch.finfo(scores.dtype).tiny)
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = scores.sort(-1)
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[..., -1] = False
            scores = scores.masked_fill(out.scatter(-1, places, out), -torch.inf)
        return scores

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32[rows, vocabulary], each row sums to 1."""
        return self(logits).softmax(-1)

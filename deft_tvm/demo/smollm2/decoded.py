"""What a decoding came to, in either way."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Decoded(NamedTuple):
    """Texts and what they took.

    Attributes:
        texts: tokens that follow the prompt, of each sequence.
        seconds: from the prompt to the last token, reading the prompt included.
        kv_held: bytes of KV in all layers, at the end.
        kv_read: bytes of KV that the last step read in all layers.
        steps: times that the model ran, on the prompt too; 0 where it was not counted.
    """

    texts: list[list[int]]
    seconds: float
    kv_held: int
    kv_read: int
    steps: int = 0

    def without_padding(self, eos: Collection[int]) -> Decoded:
        """The same without what ``generate`` puts after the first token that ends a text."""
        texts = [
            text[: next((i + 1 for i, token in enumerate(text) if token in eos), len(text))]
            for text in self.texts
        ]
        return self._replace(texts=texts)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))

    @property
    def per_second(self) -> float:
        """Tokens a second, the prompt's time included."""
        return self.tokens / self.seconds

"""How a layer's new keys and values reach the attention function, past the model's own code.

A model hands them to its cache and passes on what that returns. The function is not told of the
cache, so the cache leaves a note for it, and the function, which is what the layer calls next,
takes the note away.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deft_tvm.errors import InputError
from deft_tvm.integrations.huggingface.rows import Rows
from deft_tvm.pytorch import Step
from deft_tvm.spec import AttentionSpec

NAME = "deft_tvm"
"""Of the attention function, where transformers asks for ``attn_implementation``."""


class Note(NamedTuple):
    """What a cache tells the attention function.

    Attributes:
        cache: whose layer was updated.
        layer: its number.
        new: what the layer has to cache, keys and values or latents and rotated keys, each
            ``[B, heads, L, width]``.
        returned: what the layer got of the first for it.
    """

    cache: HandoverCache
    layer: int
    new: tuple[Tensor, Tensor]
    returned: Tensor

    def is_for(self, layer: int | None, key: Tensor) -> bool:
        """Whether it is a layer's that attends to `key`, and was not left by one that failed."""
        if self.layer != layer:
            return False
        if self.cache.specs[self.layer].rope is None:
            return key is self.returned
        return (len(key), key.shape[2]) == (len(self.returned), 1)


# One slot: nothing else of a model runs between the update of a cache and the attention function.
# Threads have contexts of their own.
_note: ContextVar[Note | None] = ContextVar("deft_tvm_note", default=None)


def take_note(layer: int | None, key: Tensor) -> Note:
    """The note for a layer that was given `key`; it is gone then.

    Raises:
        InputError: there is none.
    """
    note = _note.get()
    _note.set(None)
    if note is None or not note.is_for(layer, key):
        raise InputError(
            f"past_key_values of layer {layer} is no cache of deft_tvm; expected a TreeCache"
        )
    return note


class HandoverCache(Cache):
    """A cache whose elements go to the attention function ``deft_tvm`` and to no other.

    Attributes:
        specs: the attention of each layer.
    """

    def __init__(self, config: Any, specs: Sequence[AttentionSpec]) -> None:
        self.specs = tuple(specs)
        self._config = config
        super().__init__(layers=[_Layer(self, number) for number in range(len(self.specs))])

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note what layer `layer_idx` has to cache; see `Note`.

        Returns:
            The same; of latents one token, of which the model makes keys and values that nobody
            reads.

        Raises:
            InputError: the model has another attention, or more layers.
        """
        implementation = self._config._attn_implementation
        if implementation != NAME:
            raise InputError(
                f"the model's attention is {implementation!r}; expected "
                f"model.set_attn_implementation({NAME!r}) before it gets such a cache"
            )
        if layer_idx >= len(self.specs):
            raise InputError(
                f"layer_idx is {layer_idx}; expected one of {len(self.specs)} layers, those of the "
                f"model that the cache was made for"
            )
        new = keys, values = (key_states, value_states)
        if self.specs[layer_idx].rope is not None:
            keys, values = keys[:, :, :1], values[:, :, :1]
        _note.set(Note(self, layer_idx, new, keys))
        return keys, values

    @abstractmethod
    def begin(
        self, layer: int, query: Tensor, mask: Any, positions: Tensor | None
    ) -> tuple[Step, Rows]:
        """What the attention of a layer runs on.

        Args:
            layer: its number.
            query: ``[B, heads, L, width]``.
            mask: as the model got it: None, or ``[B, columns]`` of those before and these.
            positions: None, or ``[B or 1, L]``.

        Raises:
            InputError: they do not fit what is cached.
        """

    @abstractmethod
    def end(self, layer: int) -> None:
        """A layer has cached its elements and attended."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the cache has seen, those of padding counted as well."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask for `query_length` more, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no length at which sequences must end."""
        return -1


class _Layer(CacheLayerMixin):
    """What transformers asks single layers; all that matters is the whole cache's."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: HandoverCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: pages are there from the beginning."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(key_states, value_states, self._number)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._cache.get_max_length()


def config_of(model: Any) -> Any:
    """The part of a model's config that its text layers read."""
    return model.config.get_text_config(decoder=True)

"""A transformers model as `deft_tvm.decoding` drives models: rows of a tree in, logits out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deft_tvm.dtypes import Dtype
from deft_tvm.errors import InputError
from deft_tvm.integrations.huggingface.attention import NAME, register
from deft_tvm.integrations.huggingface.handover import config_of
from deft_tvm.integrations.huggingface.step import StepCache
from deft_tvm.models import layers
from deft_tvm.pytorch import PagedKVCache, Step, TreeAttention
from deft_tvm.pytorch.cache import runners
from deft_tvm.spec import AttentionSpec

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class HuggingFaceModel:
    """``model(tokens, step, keep)`` of a causal language model of transformers.

    While a call runs, the model's attention is ``deft_tvm``; before and after it is what the caller
    has set. It is a setting of the whole model, so that no other thread may use the model in that
    time, and switching costs a walk over its modules: ``model.set_attn_implementation("deft_tvm")``
    saves that.

    Attributes:
        model: the model.
        layers: the attention of each layer.
        attention: of each distinct spec what runs it.
    """

    def __init__(
        self, model: Any, *, page_size: int = 16, attention: Iterable[TreeAttention] = ()
    ) -> None:
        """
        Args:
            model: a causal language model in eval mode, of float32, bfloat16 or float16, on one
                device.
            page_size: tokens a page of its caches.
            attention: what runs specs of the layers, instead of the best module for each.

        Raises:
            SpecError: its config is none that `deft_tvm.models` knows.
            InputError: it trains, or has another dtype or several devices.
            DeftError: this is no platform that is supported.
        """
        register()
        if model.training:
            raise InputError("model is in training mode; expected model.eval()")
        self.model = model
        self.layers = specs_of(model, page_size)
        self.attention = list(runners(self.layers, model.device, attention).values())

    def __repr__(self) -> str:
        return f"HuggingFaceModel({type(self.model).__name__}, layers={len(self.layers)})"

    def __call__(self, tokens: Tensor, step: Step, keep: Tensor) -> Tensor:
        """One step of the model.

        Args:
            tokens: int64[rows], in the order of the step's rows.
            step: of a cache of `new_cache`.
            keep: int64[n], rows whose logits are wanted.

        Returns:
            ``[n, vocabulary]``, in the model's dtype.

        Raises:
            InputError: `tokens` is not one for each row.
        """
        return run_step(self.model, tokens, step, keep)

    def new_cache(self, num_pages: int) -> PagedKVCache:
        """An empty cache for the model's layers.

        Args:
            num_pages: pages of each layer.
        """
        return PagedKVCache(self.layers, num_pages, self.model.device, attention=self.attention)


def specs_of(model: Any, page_size: int) -> tuple[AttentionSpec, ...]:
    """The attention of each layer of a model.

    Raises:
        SpecError: its config is none that `deft_tvm.models` knows.
        InputError: its dtype is none of kernels, it lies on several devices, or it is made of
            several models.
    """
    config = config_of(model)
    if config is not model.config:
        raise InputError(
            f"model is {type(model).__name__}, with a language model as a part; expected that part"
        )
    if model.dtype not in _DTYPES:
        known = ", ".join(_DTYPES.values())
        raise InputError(f"model has dtype {model.dtype}; expected one of {known}")
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise InputError(f"model is on {', '.join(devices)}; expected one device")
    return layers(config.to_dict(), dtype=_DTYPES[model.dtype], page_size=page_size)


@torch.no_grad()
def run_step(model: Any, tokens: Tensor, step: Step, keep: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of the rows in `keep`; see `HuggingFaceModel`."""
    if tokens.shape != (step.num_rows,):
        raise InputError(
            f"tokens has shape {list(tokens.shape)}; expected [{step.num_rows}], one for each row "
            f"of the step"
        )
    with attending(model):
        out = model(
            input_ids=tokens[None],
            position_ids=step.positions[None],
            past_key_values=StepCache(model, step),
            use_cache=True,
            logits_to_keep=keep,
        )
    logits: Tensor = out.logits[0]
    return logits


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """The model's attention is ``deft_tvm`` inside, and after that what it was."""
    before = config_of(model)._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

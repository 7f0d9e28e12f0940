"""The attention of a published model, from the ``config.json`` beside its weights.

A field is read as the model's own code in Hugging Face transformers reads it, spelled as of its
version 5 (``dtype``, ``rope_parameters``) or as before (``torch_dtype``, ``rope_scaling``). Width,
scale and windows follow rules that each family has for itself, and a wrong one of them goes
unnoticed: a model type without rules here is refused, and so is a file that lacks what they need.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import msgspec

from deft_tvm.dtypes import Dtype, Layout
from deft_tvm.errors import SpecError
from deft_tvm.files import from_json
from deft_tvm.spec import AttentionSpec

CONFIG = "config.json"
SLIDING = "sliding_attention"

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=1)]
LayerType = Literal["full_attention", "sliding_attention"]


def specs(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: Dtype | None = None,
    page_size: int = 16,
    layout: Layout = "NHD",
) -> tuple[AttentionSpec, ...]:
    """The distinct specs of a model's layers, in the order in which layers first use them.

    Args and errors: those of `layers`, but that the number of layers need not be known.
    """
    found, _ = _specs(config, dtype)
    return tuple(
        dict.fromkeys(replace(layer, page_size=page_size, layout=layout) for layer in found)
    )


def layers(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: Dtype | None = None,
    page_size: int = 16,
    layout: Layout = "NHD",
) -> tuple[AttentionSpec, ...]:
    """The spec of each of a model's layers.

    Args:
        config: a model's folder, its ``config.json``, or the fields of that. Of a multimodal
            model, its ``text_config`` is taken.
        dtype: of q, out and the cache; by default the one that `config` has.
        page_size: as in `AttentionSpec`.
        layout: as in `AttentionSpec`.

    Raises:
        SpecError: the file cannot be read, its model type is none of those known here, or a field
            is missing, of another type, or out of range.
    """
    found, count = _specs(config, dtype)
    if count is None:
        raise SpecError("num_hidden_layers is missing or null; expected the number of layers")
    each = found if len(found) == count else found * count
    return tuple(replace(layer, page_size=page_size, layout=layout) for layer in each)


def _specs(
    config: str | os.PathLike[str] | Mapping[str, Any], dtype: Dtype | None
) -> tuple[list[AttentionSpec], int | None]:
    """The spec of each layer, or one where all are the same, and how many layers there are."""
    where, fields = _read(config)
    try:
        header = msgspec.convert(fields, _Header)
        text = header.text_config or header
        if text is not header:
            where, fields = f"{where}: text_config", fields["text_config"]
        family = msgspec.convert(fields, _family(text.model_type))
        return list(family.layers(dtype or _dtype(text, header))), text.num_hidden_layers
    except (SpecError, msgspec.ValidationError) as error:
        raise SpecError(f"{where}: {error}") from None


class _Header(msgspec.Struct, frozen=True):
    """What every config says, whatever the model."""

    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    num_hidden_layers: Count | None = None
    text_config: _Header | None = None


class _Grouped(msgspec.Struct, frozen=True, kw_only=True):
    """Llama: grouped queries over all tokens before them."""

    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None

    def layers(self, dtype: Dtype) -> Iterator[AttentionSpec]:
        """The spec of each layer, or one where all are the same."""
        for window in self._windows():
            yield AttentionSpec.gqa(
                num_q_heads=self.num_attention_heads,
                num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
                head_dim=self.head_dim or self._divided(),
                dtype=dtype,
                window=window,
            )

    def _divided(self) -> int:
        if self.hidden_size % self.num_attention_heads:
            raise SpecError(
                f"hidden_size is {self.hidden_size} and there is no head_dim; expected one, or a "
                f"multiple of num_attention_heads, which is {self.num_attention_heads}"
            )
        return self.hidden_size // self.num_attention_heads

    def _windows(self) -> list[int | None]:
        return [None]


class _Windowed(_Grouped, frozen=True, kw_only=True):
    """Mistral and Mixtral: a window in every layer, or in none, unless `layer_types` tells."""

    num_hidden_layers: Count
    num_key_value_heads: Count | None
    sliding_window: int | None
    layer_types: list[LayerType] | None = None

    def _windows(self) -> list[int | None]:
        if self.layer_types is None:
            slides = [self._slides(layer) for layer in range(self.num_hidden_layers)]
        else:
            slides = [kind == SLIDING for kind in self.layer_types]
        if len(slides) != self.num_hidden_layers:
            raise SpecError(
                f"layer_types has {len(slides)} entries; expected one for each of "
                f"num_hidden_layers, which is {self.num_hidden_layers}"
            )
        return [self._window() if slide else None for slide in slides]

    def _window(self) -> int:
        return _needed(self.sliding_window, "sliding_window", "layers have a sliding window")

    def _slides(self, layer: int) -> bool:
        """Whether `layer` has the window, where `layer_types` does not tell."""
        return self.sliding_window is not None


class _Alternating(_Windowed, frozen=True, kw_only=True):
    """A window in every other layer from the first on, and a width that must be told."""

    head_dim: Count

    def _slides(self, layer: int) -> bool:
        return layer % 2 == 0


class _GptOss(_Alternating, frozen=True, kw_only=True):
    """gpt-oss: attention sinks. Its YaRN is all in the rotation, and so not in the scale."""

    def layers(self, dtype: Dtype) -> Iterator[AttentionSpec]:
        for layer in super().layers(dtype):
            yield replace(layer, sinks=True)


class _Gemma2(_Alternating, frozen=True, kw_only=True):
    """Gemma 2 (arXiv 2408.00118, section 2): a soft cap, and a scale apart from the width."""

    query_pre_attn_scalar: Annotated[float, msgspec.Meta(gt=0)]
    attn_logit_softcapping: float | None

    def layers(self, dtype: Dtype) -> Iterator[AttentionSpec]:
        scale = self.query_pre_attn_scalar**-0.5
        for layer in super().layers(dtype):
            yield replace(layer, scale=scale, soft_cap=self.attn_logit_softcapping)


class _Qwen2(_Windowed, frozen=True, kw_only=True):
    """Qwen2: a window, if it is used, in the layers after the first `max_window_layers`."""

    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None

    def _windows(self) -> list[int | None]:
        return super()._windows() if self.use_sliding_window else [None]

    def _slides(self, layer: int) -> bool:
        return layer >= self._first()

    def _first(self) -> int:
        return _needed(self.max_window_layers, "max_window_layers", "use_sliding_window is true")


class _Qwen2Moe(_Qwen2, frozen=True, kw_only=True):
    """Qwen2-MoE: the window in every other one of the first `max_window_layers`."""

    def _slides(self, layer: int) -> bool:
        return layer % 2 == 0 and layer < self._first()


class _Qwen3(_Qwen2, frozen=True, kw_only=True):
    """Qwen3: Qwen2 with a width that must be told."""

    head_dim: Count


class _Qwen3Moe(_Qwen2, frozen=True, kw_only=True):
    """Qwen3-MoE: the window in every layer."""

    def _slides(self, layer: int) -> bool:
        return True


class _Rope(msgspec.Struct, frozen=True):
    """How rotation is stretched to longer contexts."""

    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    mscale_all_dim: float | None = None

    def mscale(self) -> float:
        """What YaRN (arXiv 2309.00071, section 3.4) multiplies q and k by besides rotating them."""
        if (self.rope_type or self.type or "default") == "default" or not self.mscale_all_dim:
            return 1.0
        factor = _needed(self.factor, "factor", "mscale_all_dim is there")
        return 1.0 if factor <= 1 else 0.1 * self.mscale_all_dim * math.log(factor) + 1.0


class _Latent(msgspec.Struct, frozen=True, kw_only=True):
    """DeepSeek-V2 and V3: one latent for all heads, absorbed."""

    num_attention_heads: Count
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    def layers(self, dtype: Dtype) -> Iterator[AttentionSpec]:
        """The spec of all layers."""
        mscale = (self.rope_scaling or self.rope_parameters or _Rope()).mscale()
        yield AttentionSpec.mla(
            num_q_heads=self.num_attention_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            dtype=dtype,
            scale=(self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale * mscale,
        )


Family = type[_Grouped] | type[_Latent]

_FAMILIES: dict[str, Family] = {
    "llama": _Grouped,
    "mistral": _Windowed,
    "mixtral": _Windowed,
    "qwen2": _Qwen2,
    "qwen2_moe": _Qwen2Moe,
    "qwen3": _Qwen3,
    "qwen3_moe": _Qwen3Moe,
    "gpt_oss": _GptOss,
    "gemma2": _Gemma2,
    "deepseek_v2": _Latent,
    "deepseek_v3": _Latent,
}


def _read(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What to call `config` in an error, and its fields."""
    if isinstance(config, Mapping):
        return "config", config
    if not isinstance(config, str | os.PathLike):
        raise SpecError(f"config is {type(config).__name__}; expected a path or a mapping")
    path = Path(config)
    file = path / CONFIG if path.is_dir() else path
    try:
        return str(file), from_json(file.read_bytes(), dict[str, Any])
    except OSError as error:
        raise SpecError(
            f"{file}: {error.strerror}; expected a model's folder, or its {CONFIG}"
        ) from None
    except msgspec.MsgspecError as error:
        raise SpecError(f"{file} is no {CONFIG}: {error}") from None


def _family(model_type: str | None) -> Family:
    if model_type not in _FAMILIES:
        raise SpecError(f"model_type is {model_type!r}; expected one of {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def _dtype(text: _Header, whole: _Header) -> Dtype:
    """The first that is given; whether there are kernels for it is for the spec to say."""
    given = text.dtype or text.torch_dtype or whole.dtype or whole.torch_dtype
    if given is None:
        raise SpecError(
            "there is neither dtype nor torch_dtype; expected one, or a dtype beside the config, "
            f"of {', '.join(get_args(Dtype))}"
        )
    return cast(Dtype, given)


def _needed(value: T | None, name: str, reason: str) -> T:
    if value is None:
        raise SpecError(f"{name} is missing or null; expected a number, as {reason}")
    return value

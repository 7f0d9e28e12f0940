"""Tiny random models of transformers, one of each family, whose heads share few modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from built import artifact
from torch import Tensor

from deft_tvm.pytorch import TreeAttention, load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from deft_tvm.integrations.huggingface import HuggingFaceModel, TreeCache, register  # noqa: E402
from deft_tvm.integrations.huggingface.model import specs_of  # noqa: E402

PAGE_SIZE, VOCABULARY, WINDOW = 4, 97, 5

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    # Logits and attention far from uniform, so that what a row sees decides what it says.
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "q_lora_rank": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MIXED = ["full_attention", "sliding_attention"]
_SLIDING = ["sliding_attention", "sliding_attention"]

#: By model type, what its config has besides.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2 with a window in one layer": (
        "Qwen2",
        _GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "qwen2_moe with a window in one layer": (
        "Qwen2Moe",
        _GROUPED
        | _EXPERTS
        | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}
        | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3", _GROUPED),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": WINDOW}),
    "gpt_oss": (
        "GptOss",
        _GROUPED
        | {"sliding_window": WINDOW, "layer_types": _SLIDING, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
    "gemma2": (
        "Gemma2",
        _GROUPED
        | {"sliding_window": WINDOW, "layer_types": _SLIDING, "attn_logit_softcapping": 5.0}
        | {"query_pre_attn_scalar": 16},
    ),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
}


def tiny(family: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A model in float32 and eval mode, with seeded random weights."""
    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **own, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def attention_of(model: Any) -> list[TreeAttention]:
    """What runs its layers, from modules that all tests share."""
    return [load(artifact(spec)) for spec in dict.fromkeys(specs_of(model, PAGE_SIZE))]


def new_cache(model: Any, **options: Any) -> TreeCache:
    return TreeCache(model, page_size=PAGE_SIZE, attention=attention_of(model), **options)


def adapted(model: Any) -> HuggingFaceModel:
    return HuggingFaceModel(model, page_size=PAGE_SIZE, attention=attention_of(model))


@contextmanager
def ours(model: Any) -> Iterator[None]:
    """The model has the attention of deft_tvm inside, and its own eager one after."""
    register()
    model.set_attn_implementation("deft_tvm")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """int64, none of them 0, with which batches are padded."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=random)

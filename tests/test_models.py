"""Specs from a model's config, against its own code in transformers and published files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_tvm.errors import SpecError
from deft_tvm.models import layers, specs
from deft_tvm.spec import AttentionSpec

TOKENS, WINDOW = 9, 5
TINY = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "dtype": "float32",
}
MOE = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
GPT_OSS = {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}
GEMMA = {"sliding_window": WINDOW, "head_dim": 12, "query_pre_attn_scalar": 20}
MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
TYPES = {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, width": ("Llama", {"head_dim": 12}),
    "llama, MHA": ("Llama", {"num_key_value_heads": None}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
    "mixtral, window": ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}),
    "qwen2": ("Qwen2", {"sliding_window": WINDOW, "max_window_layers": 0}),
    "qwen2, window": ("Qwen2", WINDOWED),
    "qwen2, layer types": ("Qwen2", WINDOWED | TYPES),
    "qwen2 moe": ("Qwen2Moe", MOE),
    "qwen2 moe, window": ("Qwen2Moe", MOE | WINDOWED | {"max_window_layers": 4}),
    "qwen2 moe, no layers": ("Qwen2Moe", MOE | WINDOWED | {"max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, window": ("Qwen3", WINDOWED | {"head_dim": 12}),
    "qwen3 moe": ("Qwen3Moe", MOE | {"head_dim": 12}),
    "qwen3 moe, window": ("Qwen3Moe", MOE | {"use_sliding_window": True, "sliding_window": WINDOW}),
    "gpt-oss": ("GptOss", GPT_OSS | {"head_dim": 12}),
    "gpt-oss, layer types": ("GptOss", GPT_OSS | TYPES),
    "gemma 2": ("Gemma2", GEMMA),
    "gemma 2, no cap": ("Gemma2", GEMMA | {"attn_logit_softcapping": None}),
    "deepseek v2": ("DeepseekV2", MLA),
    "deepseek v2, yarn": ("DeepseekV2", MLA | {"rope_parameters": YARN}),
    "deepseek v3": ("DeepseekV3", MLA),
    "deepseek v3, yarn": ("DeepseekV3", MLA | {"rope_parameters": YARN}),
    "deepseek v3, shrunk": ("DeepseekV3", MLA | {"rope_parameters": YARN | {"factor": 0.5}}),
    "deepseek v3, mscale 0": (
        "DeepseekV3",
        MLA | {"rope_parameters": YARN | {"mscale_all_dim": 0}},
    ),
    "deepseek v3, default": (
        "DeepseekV3",
        MLA | {"rope_parameters": YARN | {"rope_type": "default"}},
    ),
}


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def witness(layer: Any, weights: torch.Tensor) -> AttentionSpec:
    """The spec of a layer by its module, and by the weights ``[tokens, tokens]`` of its head 0."""
    seen = int((weights[-1] > 0).sum())
    options: dict[str, Any] = {
        "num_q_heads": layer.config.num_attention_heads,
        "scale": layer.scaling,
        "window": None if seen == TOKENS else seen,
        "sinks": bool(weights.sum(-1).max() < 0.999),
        "soft_cap": getattr(layer, "attn_logit_softcapping", None),
    }
    if hasattr(layer, "kv_lora_rank"):
        return AttentionSpec.mla(
            kv_lora_rank=layer.kv_lora_rank, qk_rope_head_dim=layer.qk_rope_head_dim, **options
        )
    width = layer.k_proj.out_features
    return AttentionSpec.gqa(
        num_kv_heads=width // layer.head_dim, head_dim=layer.head_dim, **options
    )


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_models_own_code(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY | fields)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = model(torch.arange(TOKENS)[None], output_attentions=True).attentions
    wanted = [
        witness(layer.self_attn, w[0, 0]) for layer, w in zip(model.layers, weights, strict=True)
    ]
    config.to_json_file(tmp_path / "config.json")
    assert specs(tmp_path) == tuple(dict.fromkeys(wanted))
    # Older versions write no layer types.
    written = config.to_dict()
    older = written if "layer_types" in fields else without(written, "layer_types")
    assert specs(older) == specs(tmp_path)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4096, "rope_scaling": None}
QWEN2 = {
    "hidden_size": 3584,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
QWEN3_MOE = QWEN2 | {
    "head_dim": 128,
    "hidden_size": 2048,
    "max_window_layers": 48,
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "sliding_window": None,
}
DEEPSEEK = {
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8"},
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
PUBLISHED_GPT_OSS = {
    "head_dim": 64,
    "hidden_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 32.0, "rope_type": "yarn", "truncate": False},
    "sliding_window": 128,
}
GEMMA_27B = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_size": 4608,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "torch_dtype": "float32",
}
V3_SCALE = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2


PUBLISHED = pytest.mark.parametrize(
    ("fields", "spelled"),
    [
        (LLAMA, ["gqa:hq=32,hkv=8,d=128,dtype=bf16"]),
        (without(LLAMA, "num_key_value_heads"), ["gqa:hq=32,hkv=32,d=128,dtype=bf16"]),
        (MISTRAL, ["gqa:hq=32,hkv=8,d=128,dtype=bf16,window=4096"]),
        (MISTRAL | {"sliding_window": None, "head_dim": None},
         ["gqa:hq=32,hkv=8,d=128,dtype=bf16"]),
        (MISTRAL | {"hidden_size": 5120, "head_dim": 128, "sliding_window": None},
         ["gqa:hq=32,hkv=8,d=128,dtype=bf16"]),
        (MISTRAL | {"model_type": "mixtral", "sliding_window": None},
         ["gqa:hq=32,hkv=8,d=128,dtype=bf16"]),
        (QWEN2, ["gqa:hq=28,hkv=4,d=128,dtype=bf16"]),
        (QWEN3_MOE, ["gqa:hq=32,hkv=4,d=128,dtype=bf16"]),
        (DEEPSEEK, [f"mla:hq=128,d=512,rope=64,dtype=bf16,scale={V3_SCALE!r}"]),
        (DEEPSEEK | {"model_type": "deepseek_v2", "rope_scaling": None},
         [f"mla:hq=128,d=512,rope=64,dtype=bf16,scale={192**-0.5!r}"]),
        (PUBLISHED_GPT_OSS | {"torch_dtype": "bfloat16"},
         [f"gqa:hq=64,hkv=8,d=64,dtype=bf16,{w}sinks=yes" for w in ("window=128,", "")]),
        (GEMMA_27B,
         [f"gqa:hq=32,hkv=16,d=128,dtype=f32,{w}cap=50.0,scale={1 / 12!r}"
          for w in ("window=4096,", "")]),
    ],
)  # fmt: skip


@PUBLISHED
def test_published_files(fields: dict[str, Any], spelled: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    assert specs(str(file)) == tuple(AttentionSpec.parse(text) for text in spelled)


@PUBLISHED
def test_written_again_they_say_the_same(fields: dict[str, Any], spelled: list[str]) -> None:
    """Transformers spells what it has read in its newer way."""
    transformers = pytest.importorskip("transformers", minversion="5")
    written = transformers.AutoConfig.for_model(**fields).to_dict()
    assert "torch_dtype" not in written and "rope_parameters" in written
    assert specs(written) == tuple(AttentionSpec.parse(text) for text in spelled)


def test_a_multimodal_model_is_its_text_model() -> None:
    (wanted,) = specs(LLAMA, dtype="float16")
    text = without(LLAMA, "torch_dtype")
    whole = {"model_type": "llava", "text_config": text, "hidden_size": 7}
    assert specs(whole | {"torch_dtype": "float16"}) == (wanted,)
    within = whole | {"text_config": text | {"dtype": "float16"}, "dtype": "bfloat16"}
    assert specs(within) == (wanted,)


def test_what_a_config_cannot_tell_is_given() -> None:
    first, second = specs(PUBLISHED_GPT_OSS, dtype="bfloat16", page_size=64, layout="HND")
    assert first.window == 128 and second.window is None
    for spec in (first, second):
        assert (spec.dtype, spec.page_size, spec.layout) == ("bfloat16", 64, "HND")
        assert {buffer.dtype for buffer in spec.buffers} == {"bfloat16"}
    assert specs(LLAMA, dtype="float32")[0].dtype == "float32"
    with pytest.raises(SpecError, match=r"^page_size is 3; expected a power of two"):
        specs(LLAMA, page_size=3)


USED = {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (LLAMA | {"model_type": "phi3"},
         "model_type is 'phi3'; expected one of llama, mistral, mixtral, qwen2, "),
        (without(LLAMA, "model_type"), "model_type is None; expected one of llama"),
        (without(LLAMA, "hidden_size"), "Object missing required field `hidden_size`"),
        (LLAMA | {"num_attention_heads": "32"},
         "Expected `int`, got `str` - at `$.num_attention_heads`"),
        (LLAMA | {"num_key_value_heads": 0}, "Expected `int` >= 1 - at `$.num_key_value_heads`"),
        (LLAMA | {"num_key_value_heads": 5}, "num_q_heads is 32; expected a multiple of"),
        (LLAMA | {"num_attention_heads": 24},
         "hidden_size is 4096 and there is no head_dim; expected one, or a multiple of "
         "num_attention_heads, which is 24"),
        (without(LLAMA, "torch_dtype"),
         "there is neither dtype nor torch_dtype; expected one, or a dtype beside the config, of "
         "float32, float16, bfloat16"),
        (LLAMA | {"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; expected one of"),
        (LLAMA | {"torch_dtype": 16}, "Expected `str | null`, got `int` - at `$.torch_dtype`"),
        (without(MISTRAL, "sliding_window"), "missing required field `sliding_window`"),
        (without(MISTRAL, "num_key_value_heads"), "missing required field `num_key_value_heads`"),
        (MISTRAL | {"sliding_window": 0}, "window is 0; expected 1 or more tokens"),
        (MISTRAL | {"layer_types": ["linear_attention"]}, "'linear_attention' - at `$.layer_types"),
        (MISTRAL | {"layer_types": ["full_attention"]},
         "layer_types has 1 entries; expected one for each of num_hidden_layers, which is 32"),
        (QWEN2 | USED | {"sliding_window": None, "max_window_layers": 21},
         "sliding_window is missing or null; expected a number, as layers have a sliding window"),
        (without(QWEN2, "max_window_layers") | USED,
         "max_window_layers is missing or null; expected a number, as use_sliding_window is true"),
        (without(QWEN3_MOE, "head_dim") | {"model_type": "qwen3"},
         "missing required field `head_dim`"),
        (without(PUBLISHED_GPT_OSS, "head_dim"), "missing required field `head_dim`"),
        (PUBLISHED_GPT_OSS | {"sliding_window": None, "dtype": "float32"},
         "sliding_window is missing or null"),
        (without(GEMMA_27B, "query_pre_attn_scalar"), "field `query_pre_attn_scalar`"),
        (without(GEMMA_27B, "attn_logit_softcapping"), "field `attn_logit_softcapping`"),
        (without(DEEPSEEK, "kv_lora_rank"), "missing required field `kv_lora_rank`"),
        (DEEPSEEK | {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}},
         "factor is missing or null; expected a number, as mscale_all_dim is there"),
        ({"text_config": without(LLAMA, "hidden_size")},
         "text_config: Object missing required field `hidden_size`"),
        ({"text_config": []}, "Expected `object | null`, got `array` - at `$.text_config`"),
    ],
)  # fmt: skip
def test_refusals_name_the_file_and_the_field(
    fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(SpecError) as refused:
        specs(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert sentence in str(refused.value)
    with pytest.raises(SpecError) as refused:
        specs(fields)
    assert str(refused.value).startswith("config: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"config.json: No such file or directory; expected a model's folder, or its config"),
        ("{", "config.json is no config.json: Input data was truncated"),
        ("[]", "is no config.json: Expected `object`, got `array`"),
        ('{"model_type": "ÿ"}', "is no config.json: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_config(text: str | None, sentence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SpecError, match=sentence):
        specs(tmp_path / "config.json")


def test_something_that_is_no_path() -> None:
    with pytest.raises(SpecError, match="config is int; expected a path or a mapping"):
        specs(3)  # type: ignore[arg-type]


def test_needs_neither_transformers_nor_the_compiler() -> None:
    program = (
        "import sys, deft_tvm.models; print({'transformers', 'tvm', 'torch'} & {*sys.modules})"
    )
    command = (sys.executable, "-c", program)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_layers_tell_each_layer_in_its_order() -> None:
    windowed = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
    config = {"model_type": "qwen2", **TINY, **windowed}
    found = layers(config, page_size=4)
    assert [layer.window for layer in found] == [None, None, None, WINDOW]
    assert tuple(dict.fromkeys(found)) == specs(config, page_size=4)
    alike = layers({"model_type": "llama", **TINY})
    assert len(alike) == 4 and len(set(alike)) == 1


def test_layers_need_their_number_and_specs_do_not() -> None:
    config = {"model_type": "llama", **TINY}
    del config["num_hidden_layers"]
    assert len(specs(config)) == 1
    with pytest.raises(SpecError, match="num_hidden_layers is missing or null; expected the num"):
        layers(config)

"""What the attention of transformers' models refuses here, and that no kernel has run then."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built import SMALL
from tiny_models import PAGE_SIZE, adapted, ours, tiny, tokens
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GPT2Config
from transformers import GPT2LMHeadModel as GPT2
from transformers.masking_utils import create_causal_mask

from deft_tvm.errors import DeftError, InputError, SpecError
from deft_tvm.integrations.huggingface import HuggingFaceModel, StepCache, TreeCache, register
from deft_tvm.integrations.huggingface.attention import padding
from deft_tvm.integrations.huggingface.checks import check_asked
from deft_tvm.integrations.huggingface.handover import take_note
from deft_tvm.integrations.huggingface.rows import kept_columns
from deft_tvm.pytorch import Step, TreeAttention
from deft_tvm.spec import AttentionSpec

IDS = tokens(2, 6)


class Unused(TreeAttention):
    """Plans nothing, and has no module."""

    artifact, deterministic, grouping = None, False, "auto"

    def __init__(self, spec: AttentionSpec, *_: Any, **__: Any) -> None:
        self.spec, self.device = spec, torch.device("cpu")

    def plan(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel would run")

    monkeypatch.setattr(Step, "attend", attend)
    for user in ("integrations.huggingface.model", "pytorch.cache"):
        monkeypatch.setattr(f"deft_tvm.{user}.TreeAttention", Unused)


def _cache(model: Any, **options: Any) -> TreeCache:
    return TreeCache(model, page_size=PAGE_SIZE, **options)


def _call(model: Any, cache: Any, ids: Tensor = IDS, **options: Any) -> None:
    with ours(model), torch.no_grad():
        model(ids, past_key_values=cache, **options)


def _mask(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)},
            r"attention_mask has shape \[2, 1, 6, 6\]; expected \[2, 6\], a token or padding",
        ),
        (
            {"attention_mask": torch.ones(2, 5)},
            r"attention_mask has shape \[2, 5\]; expected \[2, 6\]",
        ),
        (
            {"attention_mask": _mask([1] * 6, [1, 1, 1, 1, 0, 0])},
            r"attention_mask\[1\] has padding in column 4, after a token; expected padding on the",
        ),
        (
            {"attention_mask": _mask([0, 1, 0, 1, 1, 1], [1] * 6)},
            r"attention_mask\[0\] has padding in column 2, after a token",
        ),
        (
            {"position_ids": _mask([0, 1, 2, 0, 1, 2])},
            r"position_ids\[0\] goes from 2 to 0; expected consecutive positions, one sequence",
        ),
        (
            {
                "position_ids": _mask([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 4]),
                "attention_mask": _mask([1] * 6, [0, 0, 1, 1, 1, 1]),
            },
            r"position_ids\[1\] goes from 2 to 4; expected consecutive",
        ),
        ({"output_attentions": True}, "output_attentions is True; expected False, since"),
        ({"head_mask": torch.ones(4)}, "head_mask is given; expected None, attention here cannot"),
        ({"cu_seq_lens_q": _mask([0, 6])}, "cu_seq_lens_q is given; expected None"),
        ({"is_causal": False}, "masked by more than causality, a window and padding"),
        ({"s_aux": torch.ones(4)}, "s_aux of layer 0 is a logit for each head; expected none, as"),
        ({"softcap": 30.0}, "softcap of layer 0 is 30.0; expected None, as deft_tvm.models reads"),
        ({"sliding_window": 4}, "sliding_window of layer 0 is 4; expected None"),
    ],
)
def test_keywords(options: dict[str, Any], message: str) -> None:
    model = tiny()
    cache = _cache(model)
    with pytest.raises(InputError, match=message):
        _call(model, cache, **options)
    assert (cache.batch_size, cache.paged.bytes_in_use) == (0, 0)


def _set(name: str, value: Any) -> Callable[[Any], None]:
    """Sets a field of the first layer's attention."""
    return lambda model: setattr(model.model.layers[0].self_attn, name, value)


def _config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", lambda m: m.train(), "dropout is 0.5; expected 0: model.eval()"),
        ("llama", _set("is_causal", False), "is_causal is False; expected attention to what"),
        ("llama", _config("is_causal", False), "masked by more than causality, a window and pad"),
        ("llama", _config("_output_attentions", True), "output_attentions is True; expected"),
        ("llama", _set("scaling", 0.3), "scaling of layer 0 is 0.3; expected 0.25, as deft_tvm"),
        ("mistral", _config("sliding_window", 7), "sliding_window of layer 0 is 7; expected 5"),
        ("gemma2", _set("attn_logit_softcapping", 3.0), "softcap of layer 0 is 3.0; expected 5.0"),
        ("gpt_oss", _set("sinks", None), "s_aux of layer 0 is none; expected a logit for each"),
        (
            "deepseek_v2",
            _set("kv_b_proj", nn.Sequential(nn.Linear(32, 80, bias=False))),
            "kv_b_proj is Sequential; expected a torch.nn.Linear without bias, whose weight",
        ),
        (
            "deepseek_v3",
            _set("kv_b_proj", nn.Linear(32, 80)),
            "kv_b_proj is Linear with bias; expected a torch.nn.Linear without bias",
        ),
    ],
)
def test_layers_that_attend_otherwise(
    family: str, change: Callable[[Any], Any], message: str
) -> None:
    model = tiny(family, attention_dropout=0.5)
    cache = _cache(model)
    change(model)
    with pytest.raises(InputError, match=message):
        _call(model, cache)


def test_a_window_that_only_the_mask_has() -> None:
    types = ["sliding_attention", "full_attention"]
    model = tiny("qwen2_moe with a window in one layer", layer_types=types)
    cache = _cache(model)
    model.config.sliding_window = 7
    with pytest.raises(InputError, match="sliding_window of layer 0 is 7; expected 5"):
        _call(model, cache)


def test_attention_in_both_directions() -> None:
    module = tiny().model.layers[0].self_attn
    with pytest.raises(InputError, match="is_causal is False; expected attention to what came be"):
        check_asked(module, 0.0, {"is_causal": False})


def test_gradients() -> None:
    model = tiny()
    with ours(model), pytest.raises(InputError, match="q requires grad, and there is no backward"):
        model(IDS, past_key_values=_cache(model))
    model.requires_grad_(False)
    for number, name in enumerate(("k_proj", "v_proj")):
        weight = getattr(model.model.layers[0].self_attn, name).weight.requires_grad_()
        with ours(model), pytest.raises(InputError, match=rf"kv\[{number}\] requires grad"):
            model(IDS, past_key_values=_cache(model))
        weight.requires_grad_(False)


def test_masks_of_other_kinds() -> None:
    model = tiny()
    with pytest.raises(InputError, match="attention is masked by more than causality"):
        padding(use_vmap=True)
    with pytest.raises(InputError, match=r"attention_mask has shape \[3, 6\]; expected \[2, 6\]"):
        kept_columns(torch.ones(3, 6), (2, 6), 0)
    embedded = model.model.embed_tokens(IDS)
    message = "packed sequences, blocks, both directions or a function"
    with ours(model):
        for options in (
            {"or_mask_function": lambda *_: True},
            {"position_ids": _mask([0, 1, 2, 0, 1, 2])},
        ):
            with pytest.raises(InputError, match=message):
                create_causal_mask(
                    config=model.config,
                    inputs_embeds=embedded,
                    attention_mask=None,
                    past_key_values=None,
                    **options,
                )


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_caches_of_others(family: str) -> None:
    model = tiny(family)
    message = "past_key_values of layer 0 is no cache of deft_tvm; expected a TreeCache"
    stale = _cache(model)
    with ours(model):
        # What a layer that failed after its update has left is for no other.
        stale.update(torch.zeros(2, 2, 6, 16), torch.zeros(2, 2, 6, 16), 0)
    for cache in (None, DynamicCache(config=model.config)):
        with pytest.raises(InputError, match=message):
            _call(model, cache)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_what_a_cache_hands_over_is_for_one_layer_once(family: str) -> None:
    model = tiny(family)
    cache, new = _cache(model), (torch.zeros(2, 2, 6, 16), torch.ones(2, 2, 6, 16))
    message = "is no cache of deft_tvm; expected a TreeCache"
    with ours(model):
        for layer in range(2):
            key, _ = cache.layers[layer].update(*new)
            note = take_note(layer, key)
            assert note.layer == layer and note.new[0] is new[0] and note.new[1] is new[1]
            with pytest.raises(InputError, match=f"layer {layer} {message}"):
                take_note(layer, key)
        for other, given in ((0, key), (1, key[:1])):
            cache.update(*new, 1)
            with pytest.raises(InputError, match=f"layer {other} {message}"):
                take_note(other, given)


def test_attention_of_others() -> None:
    model = tiny()
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match=r"attention is 'sdpa'; expected model.set_attn_impl"):
        model(IDS, past_key_values=_cache(model))


def test_models_of_others() -> None:
    model, keys = tiny(), torch.zeros(2, 2, 6, 16)
    cache = _cache(model)
    with ours(model), pytest.raises(InputError, match="layer_idx is 2; expected one of 2 layers"):
        cache.update(keys, keys, 2)


def test_layers_out_of_turn() -> None:
    model = tiny()
    cache = _cache(model)
    query = torch.zeros(2, 4, 6, 16)
    with pytest.raises(InputError, match=r"layer 1 has a batch of \[2, 6\]; expected layer 0 bef"):
        cache.begin(1, query, None, None)
    cache.begin(0, query, None, None)
    with pytest.raises(InputError, match=r"layer 1 has a batch of \[1, 6\]; expected layer 0 bef"):
        cache.begin(1, query[:1], None, None)
    with pytest.raises(InputError, match=r"position_ids has shape \[3, 2, 6\]; expected one for"):
        cache.begin(0, query, None, torch.zeros(3, 2, 6))


def test_prefill() -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"attention_mask\[0\] has padding in column 5"):
        _cache(model).prefill(model, IDS, _mask([1] * 5 + [0], [1] * 6))
    cache = _cache(model)
    for shape in ((1, 0), (0, 4), (5,)):
        ids = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(InputError, match=r"input_ids has shape \[.*\]; expected \[prompts, "):
            cache.prefill(model, ids)
        assert (cache.batch_size, cache.get_seq_length()) == (0, 0)
    with pytest.raises(InputError, match="num_pages is 9; expected at most max_pages=8"):
        _cache(model, num_pages=9, max_pages=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_ids": tokens(1, 5), "position_ids": torch.arange(5)[None]},
            r"input_ids has shape \[1, 5\]; expected \[1, 6\], the step",
        ),
        ({"attention_mask": torch.ones(1, 6)}, "attention_mask is given; expected None, the step"),
        ({"position_ids": None}, r"position_ids is not step.positions; expected step.positions\["),
        ({"position_ids": torch.arange(6)[None]}, "position_ids is not step.positions"),
    ],
)
def test_steps(options: dict[str, Any], message: str) -> None:
    model = tiny()
    paged = HuggingFaceModel(model).new_cache(8)
    step = paged.step({paged.pool.root(): 3, paged.pool.root(): 3})
    given = {"input_ids": tokens(1, 6), "position_ids": step.positions[None]} | options
    with ours(model), torch.no_grad(), pytest.raises(InputError, match=message):
        model(past_key_values=StepCache(model, step), **given)


def test_steps_of_another_models_cache() -> None:
    model, other = adapted(tiny()), adapted(tiny(num_hidden_layers=3))
    windowed = adapted(tiny("gemma2"))
    for cache, message in (
        (other.new_cache(8), "step is of a cache with 3 layers; expected 2, those of the model"),
        (windowed.new_cache(8), "sliding_window of layer 0 is None; expected 5, as deft_tvm.mod"),
    ):
        step = cache.step({cache.pool.root(): 3})
        with pytest.raises(InputError, match=message):
            model(tokens(3), step, torch.tensor([2]))


def test_tokens_of_a_step() -> None:
    model = HuggingFaceModel(tiny())
    paged = model.new_cache(8)
    step = paged.step({paged.pool.root(): 3})
    with pytest.raises(InputError, match=r"tokens has shape \[1, 3\]; expected \[3\], one for ea"):
        model(tokens(1, 3), step, torch.arange(3))


def _on_two_devices(model: Any) -> Any:
    model.lm_head.to("meta")
    return model


class Composite:
    """Of such a model the config has a part for text."""

    training = False
    dtype = torch.float32

    class config:
        @staticmethod
        def get_text_config(decoder: bool) -> object:
            return object()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: tiny().train(), InputError, r"model is in training mode; expected model.eval\(\)"),
        (lambda: tiny().double(), InputError, "model has dtype torch.float64; expected one of flo"),
        (lambda: _on_two_devices(tiny()), InputError, "model is on cpu, meta; expected one device"),
        (Composite, InputError, "model is Composite, with a language model as a part; expected"),
        (
            lambda: GPT2(GPT2Config(n_embd=8, n_layer=1, n_head=1)).eval(),
            SpecError,
            "model_type is 'gpt2'; expected one of llama, mistral",
        ),
    ],
)
def test_models(model: Callable[[], Any], error: type[DeftError], message: str) -> None:
    with pytest.raises(error, match=message):
        HuggingFaceModel(model())


def test_attention_for_another_spec() -> None:
    message = r"attention has one for gqa:.*page=4.*; expected gqa:"
    with pytest.raises(InputError, match=message):
        HuggingFaceModel(tiny(), page_size=8, attention=[Unused(SMALL)])


def test_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    message = "platform is Darwin on arm64; expected Linux on x86_64 or Linux on aarch64"
    for use in (register, lambda: TreeCache(tiny()), lambda: HuggingFaceModel(tiny())):
        with pytest.raises(DeftError, match=message):
            use()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("None", "transformers cannot be imported ("),
        ("types.SimpleNamespace(__version__='5.9.1')", "transformers is 5.9.1; expected 5.19 or"),
    ],
)
def test_without_transformers(module: str, message: str) -> None:
    program = f"""
import sys, types
sys.modules["transformers"] = {module}
try:
    import deft_tvm.integrations.huggingface
except ImportError as error:
    print(error)
"""
    command = (sys.executable, "-c", program)
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.startswith(message)
    assert "pip install '.[hf]'" in done.stdout


def test_registering_twice_is_once() -> None:
    register()
    functions = AttentionInterface()["deft_tvm"], AttentionMaskInterface()["deft_tvm"]
    register()
    assert (AttentionInterface()["deft_tvm"], AttentionMaskInterface()["deft_tvm"]) == functions

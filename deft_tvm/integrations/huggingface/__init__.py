"""Models of Hugging Face transformers over `deft_tvm`'s trees, none of their classes replaced.

Under ``generate()``, or in any loop that hands a cache on, `TreeCache` is the cache. It keeps what
rows of a batch share once: a prompt under all its beams and samples::

    register()
    model.set_attn_implementation("deft_tvm")
    cache = TreeCache(model)
    cache.prefill(model, input_ids)
    model.generate(input_ids, past_key_values=cache, num_beams=8)

`HuggingFaceModel` is the model that `deft_tvm.decoding` drives, one step of a tree at a time.

Exact for the model types that `deft_tvm.models` knows. Latent attention (DeepSeek-V2 and V3) runs
absorbed: latents are cached and attended to, never expanded. What attention here cannot do is
refused before it runs: dropout, gradients, attention weights as an output, masks that are not
causal with padding on the left.
"""

from __future__ import annotations

from deft_tvm.integrations.huggingface.version import check_transformers

check_transformers()

from deft_tvm.integrations.huggingface.attention import NAME, register  # noqa: E402
from deft_tvm.integrations.huggingface.cache import TreeCache  # noqa: E402
from deft_tvm.integrations.huggingface.model import HuggingFaceModel  # noqa: E402
from deft_tvm.integrations.huggingface.step import StepCache  # noqa: E402

__all__ = ["NAME", "HuggingFaceModel", "StepCache", "TreeCache", "register"]

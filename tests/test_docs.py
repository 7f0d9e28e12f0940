"""The Python of the pages under docs/ runs as it stands, with a tiny model for the one it names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from built import artifact

from deft_tvm.spec import AttentionSpec

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import VOCABULARY, tiny  # noqa: E402

from deft_tvm.integrations.huggingface import NAME  # noqa: E402

PAGES = Path(__file__).parents[1] / "docs"
USES = ("samples", "beam-search", "tree-of-thoughts", "speculative-decoding", "own-model")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADS = (
    AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16),
    AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64),
)


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


def recorded(path: Path) -> None:
    """A prompt of five tokens, below which two branches grow."""
    nodes = [(0, -4, 0, [1, 2]), (1, 1, 3, []), (2, 1, 20, [])]
    fields = ("id", "start", "end", "children")
    data = {
        str(node[0]): dict(zip(fields, node, strict=True)) | {"value": node[2] - node[1] + 1}
        for node in nodes
    }
    path.write_text(json.dumps([{"incompleted": False, "data": data}]), encoding="utf-8")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page may name: modules are those of all tests, models and trees are tiny."""
    folders = {str(artifact(spec).parent) for spec in HEADS}
    monkeypatch.setenv("DEFT_TVM_MODULE_PATH", ":".join(folders))
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "trees.json")
    # As in a new process, where nothing has registered the attention yet.
    for known in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(known._global_mapping, NAME, raising=False)

    def model(name: str, dtype: torch.dtype) -> Any:
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct" and dtype == torch.float32
        return tiny("llama")

    for loaded, by in (("AutoModelForCausalLM", model), ("AutoTokenizer", lambda name: Letters())):
        monkeypatch.setattr(getattr(transformers, loaded), "from_pretrained", staticmethod(by))
    return {"__name__": "page"}


@pytest.mark.parametrize("use", USES)
def test_the_python_of_a_page_runs(use: str, names: dict[str, Any], capsys: Any) -> None:
    page = (PAGES / f"{use}.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert blocks and page.count("```python") == len(blocks)
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, f"{use}.md", "exec"), names)
    for name, cache in list(names.items()):
        if name == "cache" and hasattr(cache, "pool") and use != "own-model":
            assert cache.bytes_in_use == 0, "a page leaves branches in its cache"


# The README's attention is a model's; a small one has the module of other tests.
SMALLER = {
    "num_q_heads=32, num_kv_heads=8, head_dim=128": "num_q_heads=8, num_kv_heads=2, head_dim=64",
    'dtype="bfloat16"': 'dtype="float32"',
    "16, 8, 128, dtype=torch.bfloat16": "16, 2, 64",
    "32, 128, dtype=torch.bfloat16": "8, 64",
}


def test_the_python_of_the_readme_runs(names: dict[str, Any]) -> None:
    page = (PAGES.parent / "README.md").read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in page
        page = page.replace(large, small)
    first, second, *_ = BLOCK.findall(page)
    exec(compile(first, "README.md", "exec"), names)
    assert names["out"].shape == (2, 8, 64) and not names["out"].isnan().any()
    exec(compile(second, "README.md", "exec"), names)
    assert names["forest"].lengths.tolist() == [32, 8, 12]

"""A small attention whose module compiles in seconds, made once for all tests that need one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from built import folder

from deft_tvm.build import build
from deft_tvm.pytorch import TreeAttention, load
from deft_tvm.spec import AttentionSpec

SPEC = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=64)
FEW_SHOT = "few_shot:prompt=100,branches=5,tokens=9,vary=3"


@cache
def module() -> Path:
    """The artifact's folder."""
    return build(SPEC, out=Path(folder.name, "small"))


def attention() -> TreeAttention:
    return load(module())

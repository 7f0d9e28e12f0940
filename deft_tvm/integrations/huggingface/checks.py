"""Refusals of what a model asks its attention for and kernels here cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.spec import AttentionSpec

#: Keywords that change nothing in attention.
HARMLESS = {"position_ids", "use_cache", "output_hidden_states", "output_router_logits"}


def check_asked(module: Any, dropout: float, asked: Mapping[str, Any]) -> None:
    """Refuse what no attention here can do.

    Args:
        module: the layer's attention.
        dropout: probability.
        asked: all other keywords, but those that `check_agrees` compares.

    Raises:
        InputError: there is dropout, weights are wanted, or a keyword has a meaning unknown here.
    """
    if dropout:
        raise InputError(f"dropout is {dropout}; expected 0: model.eval()")
    causal = asked.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise InputError("is_causal is False; expected attention to what came before")
    if asked.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise InputError(
            "output_attentions is True; expected False, since attention weights are never stored"
        )
    known = HARMLESS | {"is_causal", "output_attentions"}
    for name, value in asked.items():
        if name not in known and value is not None and value is not False:
            raise InputError(f"{name} is given; expected None, attention here cannot heed it")


def check_agrees(
    layer: int,
    spec: AttentionSpec,
    scaling: float,
    sliding_window: Any,
    softcap: float | None,
    s_aux: Tensor | None,
) -> None:
    """Refuse a layer that attends in another way than its spec says.

    Raises:
        InputError: names what differs.
    """
    if not math.isclose(scaling, spec.scale, rel_tol=1e-9):
        _differs("scaling", layer, scaling, spec.scale)
    if sliding_window != spec.window:
        _differs("sliding_window", layer, sliding_window, spec.window)
    if softcap != spec.soft_cap:
        _differs("softcap", layer, softcap, spec.soft_cap)
    if (s_aux is not None) != spec.sinks:
        names = ("none", "a logit for each head")
        _differs("s_aux", layer, names[s_aux is not None], names[spec.sinks])


def _differs(name: str, layer: int, found: Any, wanted: Any) -> None:
    raise InputError(
        f"{name} of layer {layer} is {found}; expected {wanted}, as deft_tvm.models reads the "
        f"config"
    )

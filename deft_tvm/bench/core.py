"""The fixed set of cells that releases are judged by: every workload, variant and dtype.

All have pages of 16 tokens in layout NHD. Other sizes run on demand, by the same command.
"""

from __future__ import annotations

from typing import NamedTuple

MHA = "gqa:hq=32,hkv=32,d=128"
GQA_4 = "gqa:hq=32,hkv=8,d=128"
GQA_8 = "gqa:hq=32,hkv=4,d=128"
MQA = "gqa:hq=16,hkv=1,d=128"
LATENT_SCALE = 192**-0.5
"""Before absorption a head has 128 columns without rope and 64 with it."""
MLA = f"mla:hq=16,d=512,rope=64,scale={LATENT_SCALE}"
GLA_2 = f"gla:hq=16,hkv=2,d=256,rope=64,scale={LATENT_SCALE}"
GTA = "gta:hq=32,hkv=8,d=128,rope=64"


class Cell(NamedTuple):
    """One workload under one attention, each as its ``parse`` reads it."""

    workload: str
    spec: str


def _cells(workload: str, attention: str, *dtypes: str) -> tuple[Cell, ...]:
    return tuple(
        Cell(workload, f"{attention},dtype={dtype},page=16,layout=nhd") for dtype in dtypes
    )


BOTH = ("f32", "bf16")

CORE: tuple[Cell, ...] = (
    *_cells("few_shot:prompt=4000,branches=32,tokens=64", GQA_4, *BOTH),
    *_cells("few_shot:prompt=1000,branches=8,tokens=16", GQA_8, *BOTH),
    *_cells("few_shot:prompt=16000,branches=64,tokens=256", MQA, *BOTH),
    *_cells("few_shot:prompt=4000,branches=32,tokens=64", GLA_2, *BOTH),
    *_cells("multi_step", GQA_4, *BOTH),
    *_cells("multi_step", MLA, *BOTH),
    *_cells("speculative:nodes=64,context=1000", GQA_4, *BOTH),
    *_cells("speculative:nodes=8,context=4000", GQA_8, *BOTH),
    *_cells("speculative:nodes=256,context=1000", MHA, *BOTH),
    *_cells("speculative:nodes=32,context=16000", GLA_2, "bf16"),
    *_cells("speculative:nodes=128,context=4000", GTA, "f32"),
    *_cells("beam", GQA_4, *BOTH),
    *_cells("beam", GTA, "bf16"),
    *_cells("sequences", GQA_4, *BOTH),
    *_cells("sequences", MHA, "f32"),
    *_cells("sequences", GTA, "bf16"),
    *_cells("long", GQA_4, *BOTH),
    *_cells("long", GTA, "f32"),
    *_cells("long:tokens=32768", MLA, "bf16"),
    *_cells("forest", GQA_4, *BOTH),
    *_cells("forest", GLA_2, "f32"),
    *_cells("fasttree:tree=9", GQA_4, "bf16"),
    *_cells("fasttree:tree=12", MQA, "f32"),
    *_cells("fasttree:tree=6", MHA, "f32"),
    *_cells("pat:tree=1", MHA, "bf16"),
    *_cells("pat:tree=9", GQA_8, "f32"),
    *_cells("pat:tree=4", MLA, "f32"),
)

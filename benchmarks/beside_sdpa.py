# imported by the other scripts
"""`deft-tvm bench` in float32 and bfloat16, with 32 query heads over 8 KV heads of width 128."""

from __future__ import annotations

from deft_tvm.cli import main

SPEC = "gqa:hq=32,hkv=8,d=128,dtype={},page=16,layout=nhd"


def compare(workload: str, *options: str) -> None:
    """Print the table of one workload for each dtype."""
    for dtype in ("f32", "bf16"):
        try:
            main(("bench", workload, "--spec", SPEC.format(dtype), *options))
        except SystemExit as done:
            if done.code:
                raise

"""The one option that every stage has."""

from __future__ import annotations

import argparse


def device_of(doc: str | None) -> str:
    """``--device``: cuda or cpu.

    Args:
        doc: what the stage does.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found: str = parser.parse_args().device
    return found

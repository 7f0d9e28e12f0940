"""Which transformers there must be."""

from __future__ import annotations

from deft_tvm.errors import installing

OLDEST = (5, 19)
"""Whose caches and attention functions are called as here; older ones were not tried."""


def check_transformers() -> None:
    """Refuse a transformers that is missing or too old.

    Raises:
        ImportError: so it is.
    """
    wanted = f"expected {'.'.join(map(str, OLDEST))} or newer: {installing('hf')}"
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(f"transformers cannot be imported ({error}); {wanted}") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise ImportError(f"transformers is {version}; {wanted}")

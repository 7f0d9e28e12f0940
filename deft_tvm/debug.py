"""What happens inside, told on stderr (``DEFT_TVM_DEBUG``) or kept as files (``DEFT_TVM_DUMP``)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

from deft_tvm import env

_numbers = itertools.count(1)


def tell(level: int, title: str, text: Callable[[], str], suffix: str = "txt") -> None:
    """Print `text` if ``DEFT_TVM_DEBUG`` is at least `level`; keep it if ``DEFT_TVM_DUMP`` is set.

    Args:
        level: 1 to 5, as the table of `env` says what each tells.
        title: what it is about; with a running number it names the file.
        text: made only if it is wanted.
        suffix: of the file.
    """
    folder, wanted = env.DUMP.get(), env.DEBUG.get() >= level
    if folder is None and not wanted:
        return
    told = text()
    if wanted:
        for line in told.splitlines():
            print(f"deft_tvm: {line}", file=sys.stderr)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{next(_numbers):03d}-{title}.{suffix}"
        path.write_text(told + "\n", encoding="utf-8")

"""Files that a reader sees as they were or as they are, and never in between."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a new file under another name, onto the disk, then give it its own.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    final = Path(path)
    handle, scratch = tempfile.mkstemp(prefix=f".{final.name}-", dir=final.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(scratch, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise

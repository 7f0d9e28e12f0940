"""Files that a reader sees as they were or as they are, and never in between; and JSON in them."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

AnyPath = str | os.PathLike[str]

T = TypeVar("T")


def from_json(content: bytes, type: type[T]) -> T:
    """What JSON says, as a `type`.

    Raises:
        msgspec.MsgspecError: it is damaged. Bytes that are no UTF-8 and brackets without end are
            so, too, for which msgspec itself raises errors of Python's.
    """
    try:
        return msgspec.json.decode(content, type=type)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None


def write_whole(path: AnyPath, content: bytes) -> None:
    """Write a new file under another name, onto the disk, then give it its own.

    Raises:
        OSError: it cannot be written, by its own name; what was there before still is.
    """
    try:
        _write_whole(Path(path), content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write_whole(final: Path, content: bytes) -> None:
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


def append_line(path: AnyPath, line: bytes) -> None:
    """Add a line, which ends in a newline, onto the disk; all of it, or nothing and an error.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # after a line that was cut off
        try:
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def replace_folder(new: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Put the folder `new` in the place of `final`, which is empty or absent, or goes to `new`.

    On Linux a reader sees one or the other at every instant, and so does whoever comes after a
    kill; elsewhere there is an instant with neither.

    Raises:
        OSError: one of them cannot be moved.
    """
    try:
        os.replace(new, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if not _exchange(new, final):
        old = f"{os.fspath(new)}.old"
        os.replace(final, old)
        os.replace(new, final)
        os.replace(old, new)


def _exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swap two names at once, see renameat2(2); False where kernel or file system cannot."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # from glibc 2.28
    return call is not None and not call(here, os.fsencode(one), here, os.fsencode(other), exchange)

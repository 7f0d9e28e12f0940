"""The folder of what stages find: of one device, so that nothing counts for another one."""

from __future__ import annotations

from pathlib import Path

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import InputError
from deft_tvm.files import write_whole

FILE = "device.txt"


def folder_of(device: DeviceProfile, folder: Path) -> Path:
    """Make the folder, or take one that is the device's already.

    Raises:
        InputError: it holds what was found of another device.
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    if not file.is_file():
        write_whole(file, f"{device.slug}\n".encode())
    if (slug := file.read_text(encoding="utf-8").strip()) != device.slug:
        raise InputError(
            f"--out is {str(folder)!r}, with what was found of {slug}; expected a new folder for "
            f"{device.slug}"
        )
    return folder

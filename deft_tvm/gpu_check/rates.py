"""``python -m deft_tvm.gpu_check.rates``: what the device reaches, measured now."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from deft_tvm.cli import end_with_code
from deft_tvm.device import DeviceProfile
from deft_tvm.files import from_json, write_whole
from deft_tvm.gpu_check.arguments import file_in, kind_of, parser_of, use_logs
from deft_tvm.tuning.probe import copy_bandwidth, probe, write_profile

FILE = "rates-found.json"


class Rates(msgspec.Struct, frozen=True):
    """What a device reaches.

    Attributes:
        device: its profile as measured; on a GPU `launch_seconds` is a tiny kernel's in a graph.
        copy_bandwidth: bytes per second, read plus written, of a kernel that copies.
    """

    device: DeviceProfile
    copy_bandwidth: float

    @classmethod
    def of(cls, device: DeviceProfile) -> Rates:
        """Measured now; seconds."""
        return cls(probe(device), copy_bandwidth(device))


def main() -> None:
    """Print the rates as JSON, and leave them in the stage's folder; plans are made by them."""
    asked = parser_of(__doc__).parse_args()
    found = Rates.of(DeviceProfile.detect(kind_of(asked)))
    text = encoded(found)
    print(text.decode())
    if (path := file_in(asked, FILE)) is not None:
        write_whole(path, text + b"\n")
        write_profile(found.device, use_logs(asked))


def encoded(rates: Rates) -> bytes:
    return msgspec.json.format(msgspec.json.encode(rates))


def rates_here(folder: Path | None, device: DeviceProfile) -> Rates:
    """Of this device those that the stage has left in `folder`, else measured and left there, also
    where what is there is damaged."""
    path = None if folder is None else folder / FILE
    if path is not None and path.is_file():
        with suppress(msgspec.MsgspecError):
            known = from_json(path.read_bytes(), Rates)
            if known.device.slug == device.slug:
                return known
    found = Rates.of(device)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, encoded(found) + b"\n")
    return found


if __name__ == "__main__":
    end_with_code(main)

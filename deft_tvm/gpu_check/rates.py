"""``python -m deft_tvm.gpu_check.rates``: what the device reaches, measured now."""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from deft_tvm.device import DeviceProfile
from deft_tvm.gpu_check.arguments import device_of
from deft_tvm.tuning.probe import probe


def main() -> None:
    """Print the profile as JSON."""
    kind = cast(Literal["cpu", "cuda"], device_of(__doc__))
    found = probe(DeviceProfile.detect(kind))
    print(msgspec.json.format(msgspec.json.encode(found)).decode())


if __name__ == "__main__":
    main()

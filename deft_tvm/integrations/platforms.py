"""Where integrations run."""

from __future__ import annotations

import platform

from deft_tvm.errors import DeftError

SUPPORTED = (("Linux", "x86_64"), ("Linux", "aarch64"))


def check_platform() -> None:
    """Refuse a machine on which integrations have never been run.

    Raises:
        DeftError: it is not Linux on x86-64 or AArch64.
    """
    here = (platform.system(), platform.machine())
    if here not in SUPPORTED:
        known = " or ".join(" on ".join(pair) for pair in SUPPORTED)
        raise DeftError(f"platform is {' on '.join(here)}; expected {known}")

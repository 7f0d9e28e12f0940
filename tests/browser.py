"""A real browser without a screen, told what to do through a pipe (the DevTools protocol)."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
END = b"\0"


class Browser:
    """One tab.

    Attributes:
        requests: addresses of all that the tab asked for, in order.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        # Chromium reads from 3 and writes to 4; from above 9, neither covers the other.
        theirs, self._to = _pipe()
        self._from, their_answers = _pipe()
        shell = f'exec "$@" 3<&{theirs} 4>&{their_answers}'
        self._process = subprocess.Popen(
            ("bash", "-c", shell, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"),
            pass_fds=(theirs, their_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_answers)
        self._read = b""
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")
        self.call("Network.enable")

    def open(self, file: Path, width: int, height: int, **features: str) -> None:
        """Load a page into a window of so many pixels, once it is laid out.

        Args:
            features: of the medium, as in ``prefers_color_scheme="dark"``; ``media="print"``.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        media = features.pop("media", "screen")
        named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", media=media, features=named)
        self.call("Page.navigate", url=file.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page, which the page's own policy does not forbid."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """All of the page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._send("Browser.close", {})
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, params)
        while (message := self._next()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def _send(self, method: str, params: dict[str, Any]) -> int:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + END)
        return number

    def _next(self) -> dict[str, Any]:
        while END not in self._read:
            piece = os.read(self._from, 1 << 16)
            assert piece, "the browser went away"
            self._read += piece
        first, _, self._read = self._read.partition(END)
        message = json.loads(first)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message


def _pipe() -> tuple[int, int]:
    """For reading and for writing, both above 9."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]

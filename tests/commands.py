"""One command as a user runs it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deft_tvm.cli import main


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        self.code = end.value.code or 0
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

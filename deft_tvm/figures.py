"""How every drawing looks, and how it comes into a file. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

from deft_tvm.errors import InputError
from deft_tvm.files import AnyPath, write_whole

matplotlib.use("Agg")
from matplotlib import pyplot

BLUE, ORANGE, GREY = "#4c78a8", "#f58518", "#888888"
FORMATS = (".png", ".svg")

matplotlib.rcParams["svg.hashsalt"] = "deft_tvm"
"""Equal measurements make equal files."""


def plain(axes: Any) -> None:
    """No frame, and lines to read values from."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Any, path: AnyPath) -> None:
    """Write the figure as its suffix says, and close it.

    Raises:
        InputError: the suffix is another one.
        OSError: it cannot be written; what was there before still is.
    """
    pyplot.close(figure)  # which forgets it, and draws it nonetheless
    kind = Path(path).suffix
    if kind not in FORMATS:
        raise InputError(f"the drawing is {str(path)!r}; expected a name in {' or '.join(FORMATS)}")
    content = io.BytesIO()
    figure.tight_layout()
    figure.savefig(content, format=kind[1:], metadata={"Date": None})
    write_whole(path, content.getvalue())

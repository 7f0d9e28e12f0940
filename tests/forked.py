"""Processes that are forked from a server which has imported everything, so that none imports.

    processes.Process(target=…)     # as multiprocessing has it; the target lies in a module

The server imports `preloaded` when the first of them starts.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

# The server of Python 3.11 knows no other way to where these modules lie.
_HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH")))
)
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["preloaded"])

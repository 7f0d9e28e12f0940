"""What is to be done on a GPU machine whose time is short: stages, each by itself and resumable."""

from __future__ import annotations

from deft_tvm.gpu_check.runner import Record, run
from deft_tvm.gpu_check.stages import STAGES, Stage, chosen

__all__ = ["STAGES", "Record", "Stage", "chosen", "run"]

"""How fast is it: beside what a torch user could call instead, and beside the machine's limit."""

from __future__ import annotations

from deft_tvm.bench.core import CORE, Cell
from deft_tvm.bench.measure import Measurement, measure
from deft_tvm.bench.step import OURS

__all__ = ["CORE", "OURS", "Cell", "Measurement", "measure"]

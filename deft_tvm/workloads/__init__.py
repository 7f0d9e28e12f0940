"""Named trees for tuning, benchmarks and tests, recorded ones from files, and tensors for both."""

from __future__ import annotations

from deft_tvm.workloads.families import FAMILIES, Workload
from deft_tvm.workloads.notation import parse
from deft_tvm.workloads.recorded import Recording, load_recorded
from deft_tvm.workloads.tensors import Case, tensors

__all__ = ["FAMILIES", "Case", "Recording", "Workload", "load_recorded", "parse", "tensors"]

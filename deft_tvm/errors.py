"""Everything deft_tvm refuses, as one small hierarchy.

DeftError
├── SpecError       a specification that is not attention (also ValueError)
├── TreeError       parents, lengths or rows that are not a forest (also ValueError)
├── PageError       a page table that does not hold the forest's tokens (also ValueError)
│   └── OutOfPages  a pool has fewer free pages than are needed; nothing was changed
├── PlanError       a plan that cannot be made from what was given (also ValueError)
├── InputError      tensors that do not fit the spec or the plan (also ValueError)
├── WorkloadError   a workload string or a recorded tree that cannot be read (also ValueError)
├── ExactnessError  a result is further from the oracle than correct rounding explains
├── LogError        a tuning log that cannot be read or does not fit
├── TuningError     tuning cannot start or go on: another one writes the same log, a worker died
├── ArtifactError   a module that is damaged, from another version, for another device, or that
│                   cannot be written where it shall lie
└── CompilerMissing a build was asked for where no compiler is installed (also ImportError)

Every message names the argument, what it was, and what was expected.
"""

from __future__ import annotations


def installing(part: str) -> str:
    """The command for an optional part (``cli``, ``tune``, …): from a checkout, as on no index."""
    return f"`pip install '.[{part}]'` in a checkout of deft_tvm"


class DeftError(Exception):
    """Base of all errors that deft_tvm raises on purpose."""


class SpecError(DeftError, ValueError):
    """The fields of an ``AttentionSpec`` contradict each other or are out of range."""


class TreeError(DeftError, ValueError):
    """Parents, lengths or rows do not describe a forest."""


class PageError(DeftError, ValueError):
    """A page table does not hold the tokens of its forest."""


class OutOfPages(PageError):
    """A pool has fewer free pages than are needed; nothing was changed."""


class PlanError(DeftError, ValueError):
    """A plan cannot be made, or does not belong to what it is used with."""


class InputError(DeftError, ValueError):
    """A tensor has the wrong dtype, device, shape or stride, or requires a gradient."""


class LogError(DeftError):
    """A tuning log is damaged, newer than this version, or for something else."""


class ArtifactError(DeftError):
    """A module is damaged, from another version, for another device, or cannot be written."""


class CompilerMissing(DeftError, ImportError):
    """A module would have to be built, and the compiler is not installed."""


class WorkloadError(DeftError, ValueError):
    """A workload string names nothing, or a file of recorded trees is malformed."""


class TuningError(DeftError):
    """Tuning cannot start or go on."""


class ExactnessError(DeftError):
    """A result is further from the oracle than correct rounding explains."""

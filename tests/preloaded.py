"""What the server of `forked` does once, for all processes that come of it."""

from __future__ import annotations

import kills  # noqa: F401
import ranks  # noqa: F401
import tuning_run
import xgboost  # noqa: F401

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.schedules import schedule

for task in tasks_for(tuning_run.SPEC, DeviceProfile.detect()):
    schedule(task)  # Computations and intrinsics are parsed.

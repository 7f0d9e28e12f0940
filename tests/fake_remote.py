"""Stands in for `deft_tvm.tuning.remote`: ``HOST PORT KEY``, where KEY is a file of answers.

Each process takes a line of the file, an answer to all that it is asked.
"""

from __future__ import annotations

import fcntl
import sys

with open(sys.argv[3], "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    answer, *others = file.read().splitlines()
    file.seek(0)
    file.truncate()
    file.write("\n".join(others))
print('{"type":"Ready"}', flush=True)
for _ in sys.stdin:
    print(answer, flush=True)

"""How ``deft-tvm`` ends: 0 done, 1 a check failed or one of several modules could not be built."""

from __future__ import annotations

WRONG_USE = 2
"""Or something that is refused with a reason, by deft_tvm or by the system."""
FAULT = 70
"""Of deft_tvm; with its traceback."""
INTERRUPTED = 130
"""With Ctrl-C; the number is that of shells."""

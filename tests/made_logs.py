"""Two logs with a row of every kind, and searches that come nearer to their best."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparable import PASSES, noisy, run_line, trial_line

from deft_tvm.tuning.log import TuningLog

HOSTILE = "<script>alert(1)</script>&\"'"

#: Kernel: µs of its winner in A and in B; None where nothing worked, no entry where it is not.
TIMES: dict[str, dict[str, float | None]] = {
    "grew": {"A": 500.0, "B": 650.0},
    "shrank": {"A": 12000.0, "B": 8000.0},
    "stayed": {"A": 90.0, "B": 90.5},
    "broke": {"A": 200.0, "B": None},
    "left": {"A": 300.0},
    "came": {"B": 400.0},
}


def make_log(folder: Path, letter: str, **changes: Any) -> Path:
    """The log of ``A`` or of ``B``; `changes` are other fields of its run."""
    log = TuningLog(folder / "spec")
    run = run_line(minutes=10.0, seed=7, **changes)
    log.append(run)
    number = 0
    for place, (kernel, times) in enumerate(TIMES.items()):
        for fields in _trials(times[letter], 100 * place + ord(letter)) if letter in times else ():
            minute, second = divmod(7 * number, 60)
            trial = trial_line(
                number,
                kernel,
                workload=HOSTILE if kernel == "stayed" else "few_shot:prompt=4000,branches=32",
                decision={"rows": 8 if letter == "A" else 16, "tokens": 4},
                device=run.device,
                versions=run.versions,
                time=f"2026-11-20T10:{minute:02}:{second:02}+00:00",
                **fields,
            )
            log.append(trial)
            number += 1
    return folder


def damage(folder: Path) -> None:
    """One more line, cut off."""
    with TuningLog(folder / "spec").path.open("ab") as file:
        file.write(b'{"type":"tri\n')


def _trials(best_us: float | None, seed: int) -> Iterator[dict[str, Any]]:
    """Eight of a search, two or all of which end badly, then the last measurement."""
    for step in range(8):
        if best_us is None or step in (2, 5):
            yield {"status": "compile" if step % 2 else "timeout", "error": "no"}
        else:
            yield {
                "latency_us": noisy(best_us * (1 + 0.8 / (1 + step)), seed + step),
                "default": step == 0,
            }
    if best_us is not None:
        yield {
            "latency_us": noisy(best_us, seed + 10),
            "anchor_us": noisy(50.0, seed + 11, 0.01),
            "probe_us": {
                "product": noisy(5000.0, seed + 12, 0.01),
                "read": noisy(4000.0, seed + 13, 0.1),
            },
            "passes": PASSES,
            "final": True,
        }

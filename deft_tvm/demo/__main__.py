"""``python -m deft_tvm.demo``: the main job on real input; ``make run`` runs it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from deft_tvm.cli import end_with_code
from deft_tvm.commands.common import CHECK_FAILED, JsonOption, console, finite, print_json


def demo(
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Decisions to try for each dtype; by default 10, the first time."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="To spend on measuring each dtype.")
    ] = 6.0,
    as_json: JsonOption = False,
) -> None:
    """Decode 32 branches of a text with tree attention that was tuned for this machine.

    Tunes if there is no log for this machine yet, exports the module, loads it, and compares its
    answers and its speed with torch's attention. Exits with 1 if an answer is not exact.
    """
    from deft_tvm.demo.job import run
    from deft_tvm.demo.model import Shape
    from deft_tvm.demo.report import introduction, report
    from deft_tvm.demo.text import few_shot
    from deft_tvm.device import DeviceProfile

    text, shape, out = few_shot(), Shape(), console()
    if not as_json:
        out.print(introduction(text, shape, DeviceProfile.detect()))
    say = partial(typer.echo, err=True)
    outcomes = [run(text, shape, "float32", trials, seconds, say)]
    outcomes.append(run(text, shape, "bfloat16", trials, seconds, say))
    if as_json:
        print_json({outcome.dtype: outcome for outcome in outcomes})
    else:
        out.print("")
        out.print(report(outcomes))
    raise typer.Exit(0 if all(outcome.holds for outcome in outcomes) else CHECK_FAILED)


if __name__ == "__main__":
    end_with_code(partial(typer.run, demo))

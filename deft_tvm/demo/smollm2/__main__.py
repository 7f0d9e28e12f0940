"""``python -m deft_tvm.demo.smollm2``: real text by trees; ``make demo`` runs it."""

from __future__ import annotations

from functools import partial

import typer

from deft_tvm.cli import end_with_code
from deft_tvm.commands.common import CHECK_FAILED, console
from deft_tvm.demo.smollm2.prompts import QUESTION, REPEAT


def demo() -> None:
    """SmolLM2-135M answers by samples, beams and drafts, as trees and with plain transformers.

    Exits with 1 if they do not come to the same tokens.
    """
    import torch

    from deft_tvm.demo.smollm2 import report
    from deft_tvm.demo.smollm2.jobs import Bench
    from deft_tvm.demo.smollm2.weights import load
    from deft_tvm.device import DeviceProfile

    device, out = DeviceProfile.detect(), console()
    out.print(f"{device.name}, {device.cores} cores ({device.slug})")
    out.print("SmolLM2-135M-Instruct: 30 layers, 9 query heads over 3 KV heads of 64, float32\n")
    typer.echo("loading the weights", err=True)
    pretrained = load(torch.float32)
    with torch.inference_mode():
        bench = Bench(pretrained)
        done = []
        for job in (bench.samples, bench.beams, bench.drafts):
            typer.echo(f"decoding {job.__name__}", err=True)
            done.append(job())
    samples, beams, drafts = done
    decode = partial(pretrained.tokenizer.decode, skip_special_tokens=True)
    out.print(f"{len(samples.prompt)} tokens of worked examples, then: {QUESTION}\n")
    out.print(f"{samples.name}, {report.votes(samples, decode)}\n{report.texts(samples, decode)}\n")
    out.print(f"{beams.name}, the best first\n{report.texts(beams, decode)}\n")
    out.print(f"the beams as the tree that was decoded\n{report.tree(beams, decode)}\n")
    out.print(f"{drafts.name}. {REPEAT}\n{report.texts(drafts, decode)}\n")
    out.print(report.figures(done))
    raise typer.Exit(0 if all(job.same for job in done) else CHECK_FAILED)


if __name__ == "__main__":
    end_with_code(partial(typer.run, demo))

"""What the demo prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import RenderableType

from deft_tvm.commands.common import table
from deft_tvm.demo.smollm2.drawing import drawing
from deft_tvm.demo.smollm2.jobs import Job

SHOWN = 3
ANSWER = re.compile(r"The answer is (\d+)")

Decode = Callable[[Sequence[int]], str]
"""From tokens to text."""


def votes(job: Job, decode: Decode) -> str:
    """The answers of samples, those given most often first: self-consistency."""
    answers = (ANSWER.search(decode(text)) for text in job.tree.texts)
    counted = Counter(found.group(1) for found in answers if found is not None)
    told = ", ".join(f"{answer} ({count}×)" for answer, count in counted.most_common())
    return f"answers: {told or 'none'}"


def texts(job: Job, decode: Decode) -> str:
    """The first texts of a job, a line each."""
    every = job.tree.texts
    lines = [f"  {decode(text).strip()}" for text in every[:SHOWN]]
    if len(every) > SHOWN:
        lines.append(f"  … {len(every) - SHOWN} more")
    return "\n".join(lines)


def tree(job: Job, decode: Decode) -> str:
    """All that was decoded, as a tree below the prompt."""
    return drawing([[*job.prompt, *text] for text in job.tree.texts], decode)


def figures(jobs: Sequence[Job]) -> RenderableType:
    """A column for each job: speed, and KV that is held and read."""
    rows = [
        ("tokens that both came to", *("the same" if job.same else "OTHERS" for job in jobs)),
        ("tokens a second, as a tree", *(f"{job.tree.per_second:.1f}" for job in jobs)),
        ("plain transformers", *(f"{job.plain.per_second:.1f}" for job in jobs)),
        ("", *(f"{job.tree.per_second / job.plain.per_second:.1f}×" for job in jobs)),
        ("tokens a pass of the model, as a tree", *(_per_pass(job) for job in jobs)),
        ("KV held at the end, MiB, as a tree", *(_mib(job.tree.kv_held) for job in jobs)),
        ("plain transformers", *(_mib(job.plain.kv_held) for job in jobs)),
        ("KV read by the last step, MiB, as a tree", *(_mib(job.tree.kv_read) for job in jobs)),
        ("plain transformers", *(_mib(job.plain.kv_read) for job in jobs)),
    ]
    return table("", ("", *(job.name for job in jobs)), rows)


def _per_pass(job: Job) -> str:
    return f"{job.tree.tokens / job.tree.steps:.1f}" if job.tree.steps else "–"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"

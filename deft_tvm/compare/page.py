"""A comparison as one HTML page: no network, no script, readable on a telephone and on paper."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2

from deft_tvm.compare import drawing, words
from deft_tvm.compare.comparison import SURE, Comparison, Verdict
from deft_tvm.timing import SMALLEST, Summary

MARKS = {
    Verdict.SLOWER: ("worse", "▲"),
    Verdict.FASTER: ("better", "▼"),
    Verdict.SAME: ("same", ""),
    Verdict.FAILED: ("failed", "✕"),
    Verdict.ONLY_BEFORE: ("gone", "−"),
    Verdict.ONLY_AFTER: ("new", "+"),
    None: ("same", ""),
}
"""Of a verdict: its style, and a sign for those to whom colours say nothing."""


def page(found: Sequence[Comparison]) -> str:
    """One file with all comparisons in it, one or more."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deft_tvm.compare", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    made = template.render(
        comparisons=found,
        words=words,
        drawing=drawing,
        marks=MARKS,
        percent=percent,
        percents=percents,
        smallest=SMALLEST,
        band=(1 / (1 + SMALLEST), 1 + SMALLEST),
        sure=SURE,
    )
    return made.strip() + "\n"


def percent(ratio: float) -> str:
    """How much longer: 1.123 is ``+12.3 %``."""
    more = round(100 * (ratio - 1), 1)
    return f"{more:+.1f} %".replace("-", "−") if more else "0.0 %"


def percents(found: Summary) -> str:
    """An interval: ``+8.1 … +16.4 %``."""
    return f"{percent(found.low).removesuffix(' %')} … {percent(found.high)}"

"""How often the last measurement calls what it measures. A leaf."""

from __future__ import annotations

from typing import NamedTuple


class Passes(NamedTuple):
    """Of one of its two parts.

    Attributes:
        passes: how many at least, by kind of device.
        rounds: of each, if these take no longer than `SECONDS` for each decision.
        most: passes of a kernel whose time is not known well enough after `passes`.
    """

    passes: dict[str, int]
    rounds: int
    most: dict[str, int]


SECONDS = 2.0

IN_TURN = Passes({"cpu": 5, "cuda": 3}, 12, most={"cpu": 5, "cuda": 3})
"""Of the best ones and the default, to choose from."""

ALONE = Passes({"cpu": 12, "cuda": 6}, 24, most={"cpu": 36, "cuda": 6})
"""Of the winner. The fastest of so many rounds tells passes apart: of ten kernels in a noisy hour
that of six moved by 4 to 13 % from pass to pass, of 24 by 2 to 3, and by 10 for three that wait for
memory, which reading explains (AMD EPYC Zen 4, two virtual cores, 2026-11-28). A GPU has no
neighbours, and six passes are as few as prove anything for ten kernels at once."""

WELL_KNOWN = 0.012
"""Standard error of a winner's time, in parts of it, with which its passes end. Between two logs
that know it so well a change of 10 % lies 5 standard errors above the 1 % that is not looked at;
with ten kernels judged at once 3.1 are enough. After twelve passes four of ten were above 0.02;
three that wait for memory still are after 36, which reading explains to `compare`. With 0.008 and
48 passes no more changes were found, 15 of 20 for 53 of 60: from one measurement to another ten
kernels moved by 2.9 % (root mean square), and by no less for knowing each better (AMD EPYC Zen 4,
two virtual cores, 2026-11-28)."""

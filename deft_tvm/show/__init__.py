"""Trees and plans as drawings: text for a terminal, SVG for a page."""

from __future__ import annotations

from deft_tvm.show.svg import plan_svg, tree_svg
from deft_tvm.show.text import plan, tree

__all__ = ["plan", "plan_svg", "tree", "tree_svg"]

"""The partial kernel's blocks by what a CUDA schedule does with them."""

from __future__ import annotations

ROW_STATES = ("init_max", "init_sum", "find_dest", "new_max", "rescale", "new_sum", "normalise")
"""The first to write each vector over rows, row by row."""

ROW_KEEPS = ("keep_max", "keep_sum")

ROW_REDUCTIONS = {"row_max": "max", "row_sum": "sum"}

SCORE_PASSES = ("logits", "masked_logits")
OUTPUT_PASSES = ("init_out", "keep_out")
"""One element of a matrix after the other, beside `blocks.matrices_of_softmax`, the probabilities
and what is written at the end."""

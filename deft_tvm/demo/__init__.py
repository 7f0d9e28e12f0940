"""The whole path on real input: a text, a small transformer, a tuned module, and what it is worth.

``python -m deft_tvm.demo`` is what ``make run`` runs.
"""

"""A small language model with real weights that decodes by trees, beside plain transformers.

``python -m deft_tvm.demo.smollm2`` is what ``make demo`` runs. SmolLM2-135M-Instruct (Allal et al.
2025, arXiv 2502.02737; Apache License 2.0): 30 layers, 9 query heads over 3 KV heads of width 64.
"""

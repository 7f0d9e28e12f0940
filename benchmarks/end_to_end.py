# python benchmarks/end_to_end.py --trees keyword.json
"""Whole decodings of a real model, everything counted: trees beside transformers with SDPA."""

from deft_tvm.demo.smollm2.end_to_end import main

main()

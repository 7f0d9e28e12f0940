# python benchmarks/few_shot.py
"""The headline: 32 answers of 64 tokens to a prompt of 4,000, alone and between matrix products."""

from beside_sdpa import compare

compare("few_shot:prompt=4000,branches=32,tokens=64", "--between")

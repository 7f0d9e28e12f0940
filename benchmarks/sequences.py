# python benchmarks/sequences.py
"""Nothing is shared: 16 sequences of 1,024 tokens, and one of 65,536. No worse than SDPA?"""

from beside_sdpa import compare

compare("sequences:count=16,tokens=1024")
compare("long:tokens=65536")

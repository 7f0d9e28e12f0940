# python benchmarks/ties.py
"""How near to each other are the last beam that is kept and the first that is not?

`identical.py` names a prompt whose 8 beams by `deft_tvm.decoding.BeamSearch` were others than by
``generate()`` of transformers. Here the search runs over whole texts by plain transformers, without
any cache or attention of ours, and tells the steps at which its last place was hardest to give.
"""

from __future__ import annotations

import argparse

import torch

from deft_tvm.decoding import BeamSearch, Branch
from deft_tvm.demo.smollm2 import prompts, weights

QUESTION = "Who wrote Romeo and Juliet?"
BEAMS, TOKENS, SHOWN = 8, 64, 3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--question", default=QUESTION)
    asked = parser.parse_args()
    net, tokenizer = weights.load(torch.float32)
    eos = tokenizer.eos_token_id
    prompt = prompts.conversation(tokenizer, asked.question)
    search = BeamSearch(BEAMS, max_tokens=TOKENS, eos=[eos])
    live, gaps = [Branch(0)], []
    for token in range(TOKENS - 1):
        texts = torch.tensor([[*prompt, *branch.tokens] for branch in live])
        logits = net(texts, logits_to_keep=1).logits[:, -1]
        scores = torch.tensor([branch.score for branch in live])[:, None]
        totals = logits.log_softmax(-1) + scores
        totals[:, eos] = -torch.inf  # a beam that ends takes no place from those that go on
        kept, dropped = totals.flatten().topk(BEAMS + 1).values[-2:].tolist()
        gaps.append((kept - dropped, token, kept, dropped))
        nexts = [following for following in search(live, logits) if not following.done]
        live = [Branch(0, live[n.parent].tokens + tuple(n.tokens), n.score, n.state) for n in nexts]
    print(f"{asked.question!r}, {BEAMS} beams of {TOKENS} tokens, the smallest gaps")
    print(f"{'token':>7}{'last kept':>14}{'first dropped':>16}{'apart':>10}{'a float32 step':>17}")
    for gap, token, kept, dropped in sorted(gaps)[:SHOWN]:
        step = abs(kept) * torch.finfo(torch.float32).eps
        print(f"{token:7}{kept:14.6f}{dropped:16.6f}{gap:10.1e}{step:17.1e}")


if __name__ == "__main__":
    main()

"""What one launch must write, in float64 and one work item at a time, to judge candidates by.

Partials are not attention over a tree, so the oracle of whole rows cannot tell them; like it, this
follows the definition and knows no tiles:

    logit_ij = scale · Q_i · K_j        lse_i = ln Σ_j exp(logit_ij)
    out_i    = Σ_j exp(logit_ij - lse_i) V_j       over the tokens j of the item that row i sees
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deft_tvm.reference import Bound, Exact, capped, merge_states, scaled, sensitivity
from deft_tvm.tuning.subject import Launch


@dataclass(frozen=True)
class Expected:
    """What a launch writes.

    Attributes:
        outputs: float64, in the order of `Launch.outputs`; NaN where nothing must be written.
        bound: largest errors that rounding explains.
    """

    outputs: tuple[Tensor, ...]
    bound: Bound

    def error(self, outputs: Sequence[Tensor]) -> tuple[float, bool]:
        """The largest absolute difference, and whether all is right.

        Args:
            outputs: as the kernel left them; all NaN before it ran.
        """
        bounds = [self.bound.out, self.bound.lse] * (len(outputs) // 2)
        errors = list(map(_difference, self.outputs, outputs))
        within = all(error <= bound for error, bound in zip(errors, bounds, strict=True))
        return max(errors), within


def expected(launch: Launch) -> Expected:
    """What the launch's kernel must write, and how far off rounding may be; on the CPU."""
    tile = launch.subject.tile
    outputs = tuple(torch.full(t.shape, torch.nan, dtype=torch.float64) for t in launch.outputs)
    exact = _merged(launch, outputs) if tile is None else _partials(launch, outputs)
    operand = "float32" if tile is None else tile.operand
    return Expected(outputs, exact.bound(operand, launch.case.spec.dtype))


def _difference(wanted: Tensor, found: Tensor) -> float:
    """Infinite where something is missing, or was written where nothing should be."""
    found = found.cpu().double()
    if not torch.equal(wanted.isnan(), found.isnan()):
        return math.inf
    wrong = (found != wanted) & ~wanted.isnan()
    return float((found - wanted)[wrong].abs().max()) if wrong.any() else 0.0


def _partials(launch: Launch, outputs: Sequence[Tensor]) -> Exact:
    out, lse, partial_out, partial_lse = outputs
    found = [_item(launch, item) for item in launch.items.tolist()]
    for (_, num_rows, *_, dest_begin, _), exact in zip(launch.items.tolist(), found, strict=True):
        dests = torch.tensor(launch.plan.dests[dest_begin : dest_begin + num_rows]).long()
        direct = dests < 0
        out[~dests[direct]], lse[~dests[direct]] = exact.out[direct], exact.lse[direct]
        slots = dests[~direct]
        partial_out[slots], partial_lse[slots] = exact.out[~direct], exact.lse[~direct]
    return Exact(
        torch.cat([exact.out for exact in found]),
        torch.cat([exact.lse for exact in found]),
        max(exact.max_logit for exact in found),
        max(exact.max_value for exact in found),
        max(exact.max_tokens for exact in found),
    )


def _item(launch: Launch, item: Sequence[int]) -> Exact:
    """Attention of the item's rows over its tokens; out ``[rows, Hq, v_width]``."""
    case, spec, (row_begin, num_rows, *_, dest_begin, _) = launch.case, launch.case.spec, item
    page, slot, seen = launch.tokens(item)
    place = (page, slice(None), slot) if spec.layout == "HND" else (page, slot)
    read = [
        scaled(buffer[place].double(), factor, page)
        for buffer, factor in zip(case.buffers, case.scale_of, strict=True)
    ]
    keys = read[spec.k.buffer][..., spec.k.begin : spec.k.end]
    values = read[spec.v.buffer][..., spec.v.begin : spec.v.end]
    if spec.rope is not None:
        rope = read[spec.rope].expand(-1, spec.num_kv_heads, -1)
        keys = torch.cat([keys, rope], dim=-1)
    rows = torch.tensor(launch.plan.row_order[row_begin : row_begin + num_rows]).long()
    queries = case.q[rows].double().unflatten(1, (spec.num_kv_heads, -1))
    logits = spec.scale * torch.einsum("rngw,tnw->rngt", queries, keys)
    max_logit = _largest(sensitivity(logits, spec.soft_cap))
    unseen = ~seen[:, None, None].to(logits.device)
    masked = capped(logits, spec.soft_cap).masked_fill(unseen, -math.inf)
    lse = masked.logsumexp(-1)
    if case.sinks is not None:
        alone = torch.from_numpy(launch.plan.dests[dest_begin : dest_begin + num_rows] < 0)
        sinks = case.sinks.double().view(spec.num_kv_heads, -1)
        alone = alone[:, None, None].to(lse.device)
        lse = torch.where(alone, torch.logaddexp(lse, sinks), lse)
        max_logit = max(max_logit, _largest(sinks))
    weights = (masked - lse.nan_to_num(neginf=0)[..., None]).exp()
    out = torch.einsum("rngt,tnv->rngv", weights, values)
    out, lse = out.flatten(1, 2).cpu(), lse.flatten(1).cpu()
    return Exact(out, lse, max_logit, _largest(values), len(page))


def _merged(launch: Launch, outputs: Sequence[Tensor]) -> Exact:
    partial_out, partial_lse, *sinks, indptr, rows = (tensor.cpu() for tensor in launch.inputs)
    for row, *span in zip(rows.tolist(), indptr[:-1].tolist(), indptr[1:].tolist(), strict=True):
        part = slice(*span)
        out, lse = merge_states(partial_out[part], partial_lse[part])
        total = torch.logaddexp(lse, sinks[0].double()) if sinks else lse
        outputs[0][row], outputs[1][row] = out * (lse - total).exp()[..., None], total
    written = rows.long()
    return Exact(
        outputs[0][written],
        outputs[1][written],
        _largest(partial_lse),
        _largest(partial_out),
        int(indptr.diff().max()),
    )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0

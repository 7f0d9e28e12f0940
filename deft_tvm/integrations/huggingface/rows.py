"""Which elements of a batch with padding are rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deft_tvm.errors import InputError


class Rows:
    """Of a batch of B sequences and L columns those elements that are no padding.

    Attributes:
        counts: of each sequence, how many.
    """

    def __init__(self, batch: int, length: int, kept: Tensor | None = None) -> None:
        """
        Args:
            batch: B.
            length: L.
            kept: bool[B, L], those that are no padding; None: all.
        """
        self._shape = (batch, length)
        self._where = None if kept is None else kept.nonzero(as_tuple=True)
        self.counts = [length] * batch if kept is None else kept.sum(1).tolist()

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return self._shape

    def pack(self, x: Tensor) -> Tensor:
        """``[B, heads, L, width]`` → ``[rows, heads, width]``."""
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if self._where is None else x[self._where]

    def unpack(self, out: Tensor) -> Tensor:
        """``[rows, heads, width]`` → ``[B, L, heads, width]``, zeros where there is padding."""
        if self._where is None:
            return out.unflatten(0, self._shape)
        whole = out.new_zeros(*self._shape, *out.shape[1:])
        whole[self._where] = out
        return whole


def kept_columns(mask: Any, shape: tuple[int, int], columns: int) -> Tensor | None:
    """A mask of ``[B, columns so far + L]`` as bool, or None where nothing is padding.

    Args:
        mask: None, or true for each token that is no padding.
        shape: B and L.
        columns: how many came before.

    Raises:
        InputError: `mask` has another shape, or padding that is not on the left.
    """
    if mask is None:
        return None
    wanted = [shape[0], columns + shape[1]]
    found = list(mask.shape)
    if found != wanted:
        raise InputError(
            f"attention_mask has shape {found}; expected {wanted}, a token or padding for each "
            f"column of each sequence"
        )
    mask = mask.bool()
    falls = (mask[:, :-1] & ~mask[:, 1:]).nonzero()
    if len(falls):
        row, column = falls[0].tolist()
        raise InputError(
            f"attention_mask[{row}] has padding in column {column + 1}, after a token; expected "
            f"padding on the left only"
        )
    return None if bool(mask.all()) else mask


def check_cached(kept: Tensor | None, columns: int, lengths: Sequence[int]) -> None:
    """Refuse a mask whose beginning is not that of the calls before.

    Args:
        kept: as `kept_columns` returns it.
        columns: that came before.
        lengths: tokens that were cached of each sequence.

    Raises:
        InputError: a sequence had another number of tokens.
    """
    before = [columns] * len(lengths) if kept is None else kept[:, :columns].sum(1).tolist()
    for row, (said, cached) in enumerate(zip(before, lengths, strict=True)):
        if said != cached:
            raise InputError(
                f"attention_mask[{row}] has {said} tokens in the first {columns} columns; "
                f"expected {cached}, those that are cached"
            )


def check_consecutive(positions: Tensor | None, kept: Tensor | None) -> None:
    """Refuse sequences that are packed into one.

    Args:
        positions: None, or int64[B or 1, L].
        kept: bool[B, L], of which positions matter; None: of all.

    Raises:
        InputError: the position after p is not p + 1.
    """
    if positions is None:
        return
    if positions.dim() != 2:
        raise InputError(
            f"position_ids has shape {list(positions.shape)}; expected one for each column of each "
            f"sequence"
        )
    if kept is not None:
        positions = positions.expand(len(kept), -1)
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    found = (breaks if kept is None else breaks & kept[:, :-1]).nonzero()
    if len(found):
        row, column = found[0].tolist()
        pair = positions[row, column : column + 2].tolist()
        raise InputError(
            f"position_ids[{row}] goes from {pair[0]} to {pair[1]}; expected consecutive "
            f"positions, one sequence in each row of the batch"
        )

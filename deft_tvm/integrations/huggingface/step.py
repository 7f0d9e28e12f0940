"""A step of a `deft_tvm.PagedKVCache` as the cache of one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.integrations.huggingface.handover import HandoverCache, config_of
from deft_tvm.integrations.huggingface.rows import Rows
from deft_tvm.pytorch import Step


class StepCache(HandoverCache):
    """What a model is given for one step in a loop of your own::

        step = paged.step({branch: 1, other: 1})
        out = model(
            input_ids=tokens[None],
            position_ids=step.positions[None],
            past_key_values=StepCache(model, step),
        )

    The step's rows are the columns of a batch of one; which of them see each other the step knows,
    and there is no mask.
    """

    def __init__(self, model: Any, step: Step) -> None:
        """
        Args:
            model: with the attention ``deft_tvm``.
            step: of a cache with the model's layers, see `HuggingFaceModel.new_cache`.

        Raises:
            InputError: the cache has more layers, or fewer.
        """
        config, layers = config_of(model), step.cache.layers
        if len(layers) != config.num_hidden_layers:
            raise InputError(
                f"step is of a cache with {len(layers)} layers; expected "
                f"{config.num_hidden_layers}, those of the model"
            )
        super().__init__(config, layers)
        self.step = step

    def begin(
        self, layer: int, query: Tensor, mask: Any, positions: Tensor | None
    ) -> tuple[Step, Rows]:
        if layer == 0:
            self._check(query, mask, positions)
        return self.step, Rows(1, self.step.num_rows)

    def end(self, layer: int) -> None:
        """Nothing is left to do."""

    def _check(self, query: Tensor, mask: Any, positions: Tensor | None) -> None:
        shape, wanted = [query.shape[0], query.shape[2]], [1, self.step.num_rows]
        if shape != wanted:
            raise InputError(f"input_ids has shape {shape}; expected {wanted}, the step's rows")
        if mask is not None:
            raise InputError("attention_mask is given; expected None, the step is its mask")
        if positions is None or not torch.equal(positions.flatten(), self.step.positions):
            raise InputError("position_ids is not step.positions; expected step.positions[None]")

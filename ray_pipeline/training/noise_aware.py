"""Trainers for labels that are wrong now and then: TRL's DPO and KTO with a weight for each row, and conservative DPO.

Each is TRL's own trainer with other coefficients; losses, logs and everything distributed are TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from ray_pipeline.training.methods import WEIGHT

__all__ = ["ConservativeDPOTrainer", "DPOConfig", "KTOConfig", "WeightedDPOTrainer", "WeightedKTOTrainer"]

#: Stands for the logarithm of 0: its exponential is 0 in every precision of training.
_LOG_OF_NONE = -500.0


class ConservativeDPOTrainer(DPOTrainer):
    """cDPO: −(1 − ε)·log σ(β·δ) − ε·log σ(−β·δ), ε = `label_smoothing` (Mitchell 2023).

    TRL 1.16 does not read `label_smoothing` in its sigmoid loss. Its robust loss, ((1 − e)·L(δ) − e·L(−δ)) / (1 − 2e),
    is cDPO for e = −ε / (1 − 2ε).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = -self.label_smoothing / (1 - 2 * self.label_smoothing)


class _RowWeights:
    """The column `weight` from the rows to the batches, where it has the shape (rows,)."""

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        collate = self.data_collator
        self.data_collator = lambda rows: {**collate(rows), WEIGHT: torch.tensor([row[WEIGHT] for row in rows])}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns: list[str]
        if WEIGHT not in self._signature_columns:
            self._signature_columns.append(WEIGHT)


class WeightedDPOTrainer(_RowWeights, DPOTrainer):  # type: ignore[misc]
    """Σ wᵢ·Lᵢ / n over the n pairs of a batch, L being any pairwise loss of TRL."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # TRL's `use_weighting` multiplies the loss of a pair by w(chosen)·w(rejected), each the exponential of the mean
        # per token of log_probs − log_sum_sq_probs (WPO). Here each is √weight.
        inputs = dict(inputs)
        half = (inputs.pop(WEIGHT).log() / 2).clamp(min=_LOG_OF_NONE)
        half = torch.cat([half, half])[:, None]

        def weighted(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if getattr(outputs, "log_probs", None) is not None:
                outputs.log_sum_sq_probs = outputs.log_probs.detach().float() - half
            return outputs

        return super()._compute_loss(weighted, inputs, return_outputs)  # type: ignore[no-untyped-call]


class WeightedKTOTrainer(_RowWeights, KTOTrainer):  # type: ignore[misc]
    """Σ wᵢ·Lᵢ / n over the n rows of a batch, L being KTO's loss with its class weights. z0 is that of all rows."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        weight, desirable = inputs.pop(WEIGHT), inputs["label"].bool()
        of_class = self.desirable_weight, self.undesirable_weight
        # TRL multiplies the losses of a class, in the order of the batch, by the weight of the class.
        self.desirable_weight, self.undesirable_weight = (
            of_class[0] * weight[desirable],
            of_class[1] * weight[~desirable],
        )
        try:
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        finally:
            self.desirable_weight, self.undesirable_weight = of_class

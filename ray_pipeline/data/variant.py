"""A dataset of a comparison: how it is made from the run's candidates and scores, or which rows it imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.preference_sources import PreferenceSource


class DataVariant(Settings):
    """How a dataset is made: from the run's candidates and scores, or from imported rows."""

    gated: bool = Field(
        True,
        description="let the confidence gate decide; if false, take the best and worst of k by mean score, "
        "whatever the score",
    )
    gate: dict[str, Any] = Field(
        default_factory=dict,
        description="overrides of the `gate` block ({use_variance: false}, {use_critic: false}, {tau: 1})",
    )
    judges: tuple[str, ...] | None = Field(None, min_length=1, description="whose scores count; default: all")
    k: int | None = Field(None, ge=2, description="number of candidates used of each prompt; default: all")
    min_gap: float | None = Field(
        None,
        ge=0,
        description="minimum gap of a pair's scores; default: datasets.min_gap with the gate, any gap above 0 without",
    )
    source: PreferenceSource | None = Field(
        None, description="import training rows from a Hub dataset or from files; excludes the keys above"
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        description="largest number of prompts to train on (smallest hashes kept): without a gate as many pairs, and "
        "twice as many KTO rows; default: all",
    )

    @model_validator(mode="after")
    def _one_way(self) -> DataVariant:
        set_here = sorted(self.model_fields_set - {"source", "max_prompts"})
        if self.source is not None and set_here:
            raise ValueError(f"{set_here[0]} has no effect on rows of a source, which are judged already; remove it")
        if not self.gated and self.gate:
            raise ValueError("gate has no effect when gated is false")
        return self

    def how(self, judges: Sequence[str], drawn: int, gate: GateConfig | None) -> str:
        """How the dataset is made, as its page and its card describe it.

        Args:
            judges: of the run.
            drawn: number of candidates that the run draws for each prompt; 0: they are the user's.
            gate: of this dataset; None without one.
        """
        if self.source is not None:
            place = self.source.name if self.source.type == "huggingface" else self.source.place
            return f"{self.source.format} rows of {place}"
        counted, k = ", ".join(self.judges or judges), self.k or drawn or "all"
        if gate is None:
            return f"best and worst of {k} by {counted}; no gate"
        rules = [f"tau {gate.tau:g}" if gate.use_variance else "no variance rule"]
        rules.append(f"alpha {gate.alpha:g}" if gate.use_critic else "no critic")
        return f"gate on {k} candidates by {counted}; {', '.join(rules)}"

"""Settings of the agreement statistics: juries, intervals, and how verdicts are merged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.jury import PoolRule
from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.agreement.gate_curves import THRESHOLDS
from ray_pipeline.agreement.panel import DebateRule
from ray_pipeline.config.settings import Settings

#: dawid_skene: the most probable class by a latent class model of the jury's votes on all items.
PanelPool = Literal[PoolRule, "dawid_skene"]


class JurySettings(Settings):
    """The `juries` block: which juries, and how to pool their members."""

    sizes: tuple[int, ...] | None = Field(None, description="default: from two members to all")
    pool: PanelPool = Field(
        "mode",
        description="how the members' votes or scores become one verdict; dawid_skene: the most probable one by a "
        "latent class model of the votes, fitted without human labels",
    )
    weights: dict[str, float] = Field(default_factory=dict, description="by judge, for weighted and weighted_mean")
    most: int = Field(100_000, ge=1, description="refuse more juries than this")

    @model_validator(mode="after")
    def _weights(self) -> JurySettings:
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise ValueError(f"juries.sizes must be positive integers, not {list(self.sizes)}")
        weighted = self.pool in ("weighted", "weighted_mean")
        if weighted and not self.weights:
            raise ValueError(f"juries.pool {self.pool} needs juries.weights, a weight by judge")
        if self.weights and not weighted:
            raise ValueError("juries.weights is read by the pools weighted and weighted_mean only; remove it")
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError("juries.weights must not be negative")
        return self


class MeasureSettings(Settings):
    """The `measure` block: how verdicts are merged and compared with humans."""

    conflict: Conflict = Field("tie", description="merge of two orders that differ: tie, mean (of scores) or given")
    debate: DebateRule = Field("mean", description="how a debate's voices are pooled: mean of scores, or vote")
    families: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="family → how the names of its models begin; default: their first word"
    )
    draws: int = Field(2000, ge=100, description="bootstrap samples of the questions")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    seed: int = Field(0, description="seed of all sampling in this block")
    held_out: float = Field(0.5, gt=0, lt=1, description="share of the items on which the best jury is chosen")
    gate_thresholds: tuple[tuple[float, float], ...] = Field(
        THRESHOLDS, description="of the gate's curves: desirable from, undesirable to, as shares of the scale's end"
    )
    juries: JurySettings = Field(JurySettings(), description="juries of the judges")

    @model_validator(mode="after")
    def _thresholds(self) -> MeasureSettings:
        for upper, lower in self.gate_thresholds:
            if not 0 <= lower < upper <= 1:
                raise ValueError(f"gate_thresholds: {upper:g}, {lower:g} must be shares, the larger one first")
        return self

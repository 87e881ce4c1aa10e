"""Settings of the agreement statistics: juries, intervals, and how verdicts are merged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.jury import PoolRule
from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.agreement.gate_curves import THRESHOLDS
from ray_pipeline.agreement.panel import DebateRule
from ray_pipeline.config.settings import Settings

#: The most probable class by a latent class model of the jury's votes on all items (`stats.latent_class`).
LATENT: tuple[Literal["dawid_skene", "one_coin"], ...] = ("dawid_skene", "one_coin")
PanelPool = Literal[PoolRule, "dawid_skene", "one_coin"]


class JurySettings(Settings):
    """The `juries` block: which juries, and how to pool their members."""

    sizes: tuple[int, ...] | None = Field(None, description="default: from two members to all")
    pool: PanelPool = Field(
        "mode",
        description="how the members' votes or scores become one verdict; dawid_skene: the most probable one by a "
        "latent class model of the votes, fitted without human labels; one_coin: the same with a single accuracy for "
        "each judge, for few items",
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


class CalibrationSettings(Settings):
    """The `calibration` block: probabilities of the human label from votes, scores and human labels of other items."""

    folds: int = Field(
        5, ge=3, le=50, description="parts of the questions; what is measured on one is chosen and fitted on the others"
    )
    least: int = Field(
        50, ge=1, description="labels below which no model is fitted, and the posterior without labels stands"
    )


class CascadeSettings(Settings):
    """The `cascade` block: cheap judges first, an expensive one where they are least sure."""

    expensive: str | None = Field(
        None, description="name of the expensive judge; default: the best one on the part where juries are chosen"
    )
    cheap: tuple[str, ...] | None = Field(None, min_length=1, description="the cheap judges; default: all others")

    @model_validator(mode="after")
    def _distinct(self) -> CascadeSettings:
        if self.cheap is not None and self.expensive in self.cheap:
            raise ValueError(f"cascade: {self.expensive} is both the expensive judge and among the cheap ones")
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
    calibration: CalibrationSettings = Field(
        CalibrationSettings(), description="what human labels decide, and on which other items it is measured"
    )
    cascade: CascadeSettings = Field(CascadeSettings(), description="kappa against the share of expensive calls")

    @model_validator(mode="after")
    def _thresholds(self) -> MeasureSettings:
        for upper, lower in self.gate_thresholds:
            if not 0 <= lower < upper <= 1:
                raise ValueError(f"gate_thresholds: {upper:g}, {lower:g} must be shares, the larger one first")
        return self

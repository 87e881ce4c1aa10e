"""The keys and checks of workflows in rounds: the policy of one answers the prompts of the next, and is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import default_checker
from ray_pipeline.evaluate.early_stop import StopSettings
from ray_pipeline.training.spec import Reference, TrainSettings
from ray_pipeline.workflow.training import TrainingConfig

T = TypeVar("T")


class RoundsSettings(Settings):
    """The `rounds` block. Raising `n` adds rounds and remakes none."""

    n: int = Field(1, ge=1, le=99, description="number of rounds")
    prompts: Literal["split", "same"] = Field(
        "split", description="split: each round has another part of the prompts; same: each has all of them"
    )
    parts: int = Field(
        3,
        ge=2,
        le=99,
        description="with split, the number of parts, whatever n is; round parts + 1 takes the first part again",
    )
    data: Literal["last", "all", "window"] = Field(
        "last",
        description="what a round trains on. last: its own rows, and window: those of the last rounds, from the "
        "adapter of the round before; all: the rows of all rounds so far, from the base",
    )
    window: int = Field(2, ge=2, description="with data: window, the number of rounds whose rows are used")
    reference: Reference = Field(
        "base", description="reference model of the loss: the base, or from round 2 on the policy of the round before"
    )
    decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from each round to the next: round r trains with train.learning_rate "
        "· decay^(r − 1)",
    )
    stop: StopSettings | None = Field(
        None,
        description="early stop on held-out prompts, with the policy of the best round as the result; default: none",
    )

    @model_validator(mode="after")
    def _from_a_policy(self) -> RoundsSettings:
        for key, value, default in (("reference", self.reference, "base"), ("decay", self.decay, 1)):
            if self.data == "all" and value != default:
                raise ValueError(
                    f"{key} is {value}, but with data: all each round trains from the base; set {key} to {default}, or "
                    "data to last or window"
                )
        return self

    @property
    def continues(self) -> bool:
        """Whether a round trains the adapter of the round before."""
        return self.data != "all"

    @property
    def splits(self) -> bool:
        return self.n > 1 and self.prompts == "split"

    def training(self, settings: TrainSettings, number: int) -> TrainSettings:
        """The settings that a round trains with.

        Args:
            settings: of the first round.
            number: of the round, from 1.
        """
        if self.decay == 1:
            return settings
        return settings.model_copy(update={"learning_rate": settings.learning_rate * self.decay ** (number - 1)})

    def pooled(self, before: Sequence[T]) -> Sequence[T]:
        """Of the rounds before one, those whose rows it uses, too."""
        kept = {"last": 0, "window": self.window - 1, "all": len(before)}[self.data]
        return before[len(before) - kept :] if kept < len(before) else before


class RoundsConfig(TrainingConfig):
    """The keys of a workflow that can have rounds."""

    rounds: RoundsSettings | None = Field(
        None,
        description="several rounds: the policy of each answers the prompts of the next, and is trained on; default: "
        "one round",
        exclude_if=lambda block: block is None,
    )

    @property
    def numbers(self) -> range:
        """The rounds, from 1."""
        return range(1, 2 if self.rounds is None else self.rounds.n + 1)

    @model_validator(mode="after")
    def _rounds_can_follow(self) -> Self:
        if self.rounds is not None and self.rounds.n > 1:
            self.check_rounds(self.rounds)
        return self

    def check_rounds(self, rounds: RoundsSettings) -> None:
        """Raises ValueError for what rounds after the first cannot have."""
        train = self.train
        if train is None or not self.trains_policy:
            found = "train is null" if train is None else f"train.method {train.method} trains none"
            raise ValueError(f"rounds: the policy of a round answers the prompts of the next, but {found}")
        if self.evaluate.skip_generation:
            raise ValueError("rounds: evaluate.skip_generation leaves out what the curves show; set it to false")
        known = self.evaluate.checker or default_checker(s.label_in_tables for s in self.prompt_settings.sources)
        if rounds.stop is not None and rounds.stop.metric == "accuracy" and known is None:
            raise ValueError(
                "rounds.stop.metric is accuracy, but no checker knows which responses are right; set evaluate.checker, "
                "or metric to score"
            )
        if rounds.continues:
            if train.lora is None or train.save == "merged":
                raise ValueError(
                    f"rounds.data is {rounds.data}, so that the adapter of the round before is trained on; set "
                    "train.save to adapter or both (with train.lora), or rounds.data to all"
                )
            if train.shard == "zero3":
                raise ValueError(
                    "rounds: a stored adapter cannot be loaded into zero3's shards; set train.shard to fsdp"
                )

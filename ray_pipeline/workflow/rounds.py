"""Rounds: the policy of one answers the prompts of the next, and is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.datasets import Judged
from ray_pipeline.evaluate.early_stop import StopSettings
from ray_pipeline.graph.stage import Stage
from ray_pipeline.training.spec import Reference, TrainSettings


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

    def pooled(self, before: Sequence[Round]) -> Sequence[Round]:
        """Of the rounds before one, those whose rows it uses, too."""
        kept = {"last": 0, "window": self.window - 1, "all": len(before)}[self.data]
        return before[len(before) - kept :] if kept < len(before) else before


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of a DAG.

    Attributes:
        number: from 1.
        stages: its own, each after those that it reads.
        policy: the stage that trains; None where nothing is trained.
        base: responses of the base to the held-out prompts, which all rounds share.
        decision: whether the next round is made; None where no round stops the run.
    """

    number: int
    judged: Judged
    stages: Sequence[Stage]
    policy: Stage | None
    base: Stage | None
    decision: Stage | None = None


def ending_of(number: int) -> str:
    """What the names of a round's stages and of its policy end with; the first has the names of a run without rounds,
    which it continues."""
    return "" if number == 1 else f"-{number}"


def numbered(shared: Sequence[Stage], rounds: Sequence[Round]) -> list[Stage]:
    """The stages of all rounds with their number, and from round 2 on in groups of their own (`train-2`). Neither is in
    a fingerprint.

    Args:
        shared: stages of no round.
    """
    made: dict[Stage, Stage] = {}

    def make(stage: Stage, number: int) -> Stage:
        if stage not in made:  # parents of an earlier round are there already
            inputs = {role: make(parent, number) for role, parent in stage.inputs.items()}
            ending = ending_of(number)
            group = f"{stage.group_name.removesuffix(ending)}{ending}" if number else stage.group
            made[stage] = dataclasses.replace(stage, inputs=inputs, group=group, round=number)
        return made[stage]

    stages = [make(stage, 0) for stage in shared]
    for one in rounds:
        stages += [make(stage, 0 if stage is one.base else one.number) for stage in one.stages]
    return list(dict.fromkeys(stages))

"""Data for multi-agent improvement: several reviews of each first response, and several revisions of each review.

    responses → reviews, several of each → revisions, several of each review → judges → rows

Their training rows are made in `feedback.improvement_rows`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ray_pipeline.agents.feedback_loop import revision_messages
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.config.settings import Settings, over
from ray_pipeline.data.candidates import generated
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.loop import (
    LoopSettings,
    Reviewing,
    ReviewItem,
    response_row,
    review_counts,
    review_one,
    review_role,
    review_rows,
    review_stages,
)
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import REVIEWS, REVISIONS

_WARM = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=1024)


class ImproveSettings(Settings):
    """The `improve` block."""

    prompts: PromptsConfig | None = Field(None, description="prompts of these datasets; default: those of the run")
    reviews: int = Field(2, ge=1, le=64, description="number of reviews per response and reviewer")
    revisions: int = Field(2, ge=1, le=64, description="number of revisions per review")
    seed: int = Field(0, description="seed of all sampling in this block")
    sampling: Annotated[SamplingSettings, over(_WARM)] = Field(
        _WARM, description="for revisions; `reviewing` is for reviews. The first responses are sampled as in the loop"
    )
    reviewing: Annotated[SamplingSettings, over(_WARM)] = _WARM
    train: tuple[Literal["revisions", "reviews"], ...] = Field(
        (),
        description="datasets to train a policy on, by the `train` block: the generator on `revisions`, the first "
        "reviewer's model on `reviews`; none of them where `train` is null",
    )

    @model_validator(mode="after")
    def _differ(self) -> ImproveSettings:
        for count, sampling, key in (
            (self.reviews, self.reviewing, "reviewing"),
            (self.revisions, self.sampling, "sampling"),
        ):
            if count > 1 and sampling.temperature == 0:
                raise ValueError(
                    f"{key}.temperature is 0, so all {count} would be equal; raise it or set the number to 1"
                )
        return self


@dataclasses.dataclass(frozen=True)
class Branches:
    """Stages of first responses, of reviews (one per model), and of revisions of every review."""

    responses: Stage
    reviews: list[Stage]
    revisions: Stage


def branch_stages(
    settings: ImproveSettings, loop: LoopSettings, models: Mapping[str, ModelSettings], prompts: Stage, responses: Stage
) -> Branches:
    """Reviews and revisions of first responses.

    Args:
        responses: candidates of `prompts`, one each.
    """
    texts, inputs = loop.texts(), {"prompts": prompts, "responses": responses}
    drawing = _Draw(sampling=settings.reviewing, template=texts.review, asking=loop.asking, number=settings.reviews)
    reviews = review_stages(DRAW_REVIEWS, drawing, loop, models, inputs, "improve-review", "branch reviews")
    inputs = {**inputs, **{f"reviews/{stage.name}": stage for stage in reviews}}
    revise = _Revise.part_of(settings, revise=texts.revise, number=settings.revisions)
    return Branches(responses, reviews, REVISE.stage("improve-revise", revise, models[loop.generator], inputs))


class _Draw(Reviewing):
    number: int


def _reviews(shard: ShardTables, settings: _Draw) -> Iterator[ReviewItem]:
    messages = shard.messages()
    for answer in shard.rows("responses"):
        if answer["response"] is not None:
            prompt = answer["prompt_id"]
            for reviewer in settings.reviewers:
                for sample in range(settings.number):
                    yield ReviewItem(prompt, messages[prompt], answer, reviewer, settings.sampling, answer["k"], sample)


DRAW_REVIEWS = Asking(
    tables={"reviews": REVIEWS}, items=_reviews, ask=review_one, role=review_role, counts=review_counts
)


class _Revise(Settings):
    revise: str
    sampling: SamplingSettings
    seed: int
    number: int


class _Revision(NamedTuple):
    prompt_id: str
    messages: list[Message]
    review_id: str
    number: int
    k: int


def _revisions(shard: ShardTables, settings: _Revise) -> Iterator[_Revision]:
    """Revisions of every review that requests a change, ordered by prompt, review and number."""
    messages = shard.messages()
    answers = {row["candidate_id"]: row for row in shard.rows("responses")}
    place: dict[str, int] = collections.Counter()
    for review in sorted((row for row in review_rows(shard) if row["feedback"]), key=review_key):
        prompt, answer = review["prompt_id"], answers[review["candidate_id"]]
        turns = revision_messages(messages[prompt], answer["response"], review["feedback"], settings.revise)
        for number in range(settings.number):
            place[prompt] += 1
            yield _Revision(prompt, turns, review["review_id"], number, answer["k"] + place[prompt])


def review_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["prompt_id"], row["reviewer"], row["review_id"]


async def _revise(engine: ChatEngine, settings: _Revise, item: _Revision) -> Outcome:
    seed = derived_seed("revision", settings.seed, item.review_id, item.number)
    sampling = settings.sampling.sampling(seed=seed)
    row: Row = await response_row(engine, item.prompt_id, item.messages, sampling, item.k)
    return Outcome({"revisions": [{**row, "review_id": item.review_id}]}, generated("the generator", row))


REVISE = Asking(
    tables={"revisions": REVISIONS},
    items=_revisions,
    ask=_revise,
    role="improve/revise",
    counts=count_by("revisions", "finish_reason"),
)

"""The feedback loop as stages that take turns: generate-1 → review-1 → generate-2 → review-2 → … → generate-N.

Only one model need be loaded at a time; a prompt whose loop has ended gives no further rows. What a loop does next
follows from its reviews by `feedback_loop.next_step`, as in the coroutine of that module.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.feedback_loop import (
    FeedbackTemplates,
    Review,
    ReviewAsking,
    Stop,
    load_feedback_templates,
    next_step,
    respond,
    review,
    revision_messages,
)
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.templates import RoleTemplate
from ray_pipeline.engines.base import Completion, Message, PromptTooLong
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import candidate_id, derived_seed, digest
from ray_pipeline.store.schemas import CANDIDATES, READ_STATUSES, REVIEWS, to_table
from ray_pipeline.store.settings import Settings

_PUBLISHED = SamplingSettings(temperature=0.0, max_tokens=1024)


class ReviewerSettings(Settings):
    """One reviewer: its name in the tables, the model that it is, and what it looks at."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")
    model: str = Field("reviewer", description="a key of `models`")
    focus: str = Field("", description="what it looks at; default: the template's own question")
    sampling: SamplingSettings | None = Field(None, description="default: the block's `reviewing`")


class LoopRules(Settings):
    """How a feedback loop goes, whoever takes part.

    Attributes:
        responses: N, how many responses a prompt has at most; all but the last are reviewed.
        sampling: of responses and revisions; `reviewing` is of the reviews.
        templates: built-in name or YAML file of what reviewers and generator are told.
    """

    responses: int = Field(3, ge=1, le=26)
    seed: int = 0
    sampling: SamplingSettings = _PUBLISHED
    reviewing: SamplingSettings = _PUBLISHED
    asking: ReviewAsking = ReviewAsking()
    templates: str = "default"

    @field_validator("sampling", "reviewing", mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        """A block that sets one key keeps the published others."""
        return {**_PUBLISHED.model_dump(), **given} if isinstance(given, Mapping) else given

    def texts(self) -> FeedbackTemplates:
        return load_feedback_templates(self.templates)


class LoopSettings(LoopRules):
    """The `loop` block: how the loop goes, and who takes part.

    Attributes:
        generator: a key of `models`.
    """

    generator: str = "generator"
    reviewers: tuple[ReviewerSettings, ...] = Field((ReviewerSettings(name="reviewer"),), min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> LoopSettings:
        names = [r.name for r in self.reviewers]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two reviewers have the same name: {', '.join(twice)}")
        asked: dict[str, str] = {}
        for reviewer in self.reviewers:
            call = reviewer.model_dump_json(exclude={"name"})
            if call in asked:
                raise ValueError(
                    f"reviewers {asked[call]} and {reviewer.name} would say the same: one model, focus and sampling; "
                    "give one of them another"
                )
            asked[call] = reviewer.name
        return self

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.reviewers]

    @property
    def review_models(self) -> list[str]:
        """Keys of the models that review, in the order in which reviewers name them."""
        return list(dict.fromkeys(r.model for r in self.reviewers))


class _Generate(Settings):
    k: int
    seed: int
    sampling: SamplingSettings
    revise: str
    reviewers: tuple[str, ...]


class _Review(Settings):
    reviewers: tuple[ReviewerSettings, ...]
    sampling: SamplingSettings
    template: RoleTemplate
    asking: ReviewAsking
    iteration: int


def feedback_stages(
    settings: LoopSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    *,
    prefix: str = "",
    first: Stage | None = None,
) -> tuple[Stage, list[Stage], list[Stage]]:
    """The loop over all prompts.

    Args:
        prefix: before the names of the stages, where a workflow has several loops.
        first: the stage of the first responses, where several loops begin with the same.

    Returns:
        A stage with all responses as candidates (k: which response of its prompt, from 0), the stages that made them,
        and those that made the reviews.
    """
    texts = settings.texts()
    made: list[Stage] = []
    reviews: list[Stage] = []
    for k in range(settings.responses):
        if k == 0 and first is not None:
            made.append(first)
            continue
        if k:
            reviews += _reviews(settings, failure, models, texts, prompts, made[-1], k - 1, prefix)
        given = _Generate(
            k=k,
            seed=settings.seed,
            sampling=settings.sampling,
            revise=texts.revise if k else "",
            reviewers=tuple(settings.names) if k else (),
        )
        last = {"last": made[-1], **{f"reviews/{stage.name}": stage for stage in reviews}} if k else {}
        model = models[settings.generator]
        inputs = {"prompts": prompts, **last}
        name = f"{prefix}generate-{k + 1}"
        made.append(llm_stage(name, generate_shard, ("candidates",), given, model, failure, inputs))
    joined = Stage(
        name=f"{prefix}candidates",
        work=ShardWork(function=join_shard, tables=("candidates",)),
        config=None,
        inputs={stage.name: stage for stage in made},
    )
    return joined, made, reviews


def _reviews(
    settings: LoopSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    texts: FeedbackTemplates,
    prompts: Stage,
    last: Stage,
    iteration: int,
    prefix: str,
) -> list[Stage]:
    """One stage a model: reviews of models are their own stages and are joined by key."""
    stages = []
    for key in settings.review_models:
        given = _Review(
            reviewers=tuple(r for r in settings.reviewers if r.model == key),
            sampling=settings.reviewing,
            template=texts.review,
            asking=settings.asking,
            iteration=iteration,
        )
        group, inputs = f"{prefix}review-{iteration + 1}", {"prompts": prompts, "last": last}
        name = group if len(settings.review_models) == 1 else f"{group}-{key}"
        stages.append(llm_stage(name, review_shard, ("reviews",), given, models[key], failure, inputs, group=group))
    return stages


# --- generating -------------------------------------------------------------------------------------------------------


async def generate_shard(given: ShardInput) -> ShardOutput:
    """Response number k of one shard's prompts, ordered by prompt; counts say how many loops ended, and why."""
    settings: _Generate = given.settings
    counts: dict[str, int] = collections.Counter()
    asked = []
    if settings.k == 0:
        asked = [(row["prompt_id"], row["messages"]) for row in given.tables["prompts"].to_pylist()]
    else:
        messages = {row["prompt_id"]: row["messages"] for row in given.tables["prompts"].to_pylist()}
        reviews = reviews_by_prompt(review_tables(given.tables), settings.reviewers)
        for last in given.tables["last"].to_pylist():
            prompt = last["prompt_id"]
            feedback, stop = what_next(last, reviews.get(prompt, []))
            if stop is not None:
                counts[f"ended.{stop}"] += 1
                continue
            turns = revision_messages(messages[prompt], last["response"], feedback[-1], settings.revise)
            asked.append((prompt, turns))
    rows = await all_of(_generate(given, settings, prompt, turns) for prompt, turns in asked)
    for row in rows:
        counts[row["finish_reason"]] += 1
    return ShardOutput({"candidates": to_table(rows, CANDIDATES)}, dict(counts))


async def _generate(given: ShardInput, settings: _Generate, prompt: str, messages: Sequence[Message]) -> dict[str, Any]:
    seed = derived_seed("response", settings.seed, prompt, settings.k)
    row = await drawn(given, prompt, messages, settings.sampling, seed, settings.k, f"generate/{settings.k + 1}")
    given.tick(1)
    return row


async def drawn(
    given: ShardInput,
    prompt: str,
    messages: Sequence[Message],
    settings: SamplingSettings,
    seed: int,
    k: int,
    role: str,
) -> dict[str, Any]:
    """A row of schema CANDIDATES. Its id follows from all that was asked, so revisions of other feedback differ."""
    assert given.engine is not None
    identity, sampling = given.engine.identity, settings.sampling(seed=seed)
    asked = {**sampling.key(), "asked": digest(["asked", *([m["role"], m["content"]] for m in messages)])}
    row: dict[str, Any] = {
        "candidate_id": candidate_id(prompt, identity, asked, k),
        "prompt_id": prompt,
        "k": k,
        "seed": seed,
        "response": None,
        "generator": identity["model"],
        "prompt_tokens": None,
        "completion_tokens": None,
    }
    reply = await respond(given.engine.bound(prompt, role), messages, sampling)
    if isinstance(reply, Completion):
        row |= {
            "response": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
    elif isinstance(reply, PromptTooLong):
        row |= {"finish_reason": "too_long", "prompt_tokens": reply.prompt_tokens}
    else:
        row |= {"finish_reason": "error"}
    given.watch("the generator", row["finish_reason"] != "error")
    return row


def review_tables(tables: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    """The reviews of all review stages, by role name."""
    return [row for role in sorted(tables) if role.startswith("reviews/") for row in tables[role].to_pylist()]


def reviews_by_prompt(rows: Sequence[Mapping[str, Any]], reviewers: Sequence[str]) -> dict[str, list[list[Review]]]:
    """Prompt → the reviews of its first, second … response, each by the reviewers in their order.

    Raises:
        KeyError: a review is of a reviewer that is not named.
        ValueError: a response lacks the review of one of them, naming prompt and response.
    """
    place = {name: number for number, name in enumerate(reviewers)}
    found: dict[str, dict[int, dict[int, Review]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows:
        said = Review(row["feedback"], row["score"], row["reason"], row["parse_status"], row["raw"])
        found[row["prompt_id"]][row["iteration"]][place[row["reviewer"]]] = said
    for prompt, of_prompt in found.items():
        for iteration in range(len(of_prompt)):
            if len(of_prompt.get(iteration, ())) != len(place):
                raise ValueError(f"reviews: response {iteration} of prompt {prompt!r} was not reviewed by all")
    return {
        prompt: [[by[n] for n in sorted(by)] for _, by in sorted(of_prompt.items())]
        for prompt, of_prompt in found.items()
    }


def what_next(last: Mapping[str, Any], reviews: Sequence[Sequence[Review]]) -> tuple[list[str], Stop | None]:
    """All feedback that a loop was revised by, the next one included, and why it ends, if it does.

    Args:
        last: row of the last response, with `response` and `k`.
        reviews: of every response up to it.
    """
    feedback: list[str] = []
    for said in reviews:
        step, stop = next_step(said, feedback)
        if step is None:
            return feedback, stop
        feedback.append(step)
    if last["response"] is None:
        return feedback, "no_response"
    return feedback, None if len(feedback) == last["k"] + 1 else "limit"


def join_shard(given: ShardInput) -> ShardOutput:
    """All responses of one shard as candidates, ordered by prompt and k."""
    table = pa.concat_tables(list(given.tables.values())).sort_by([("prompt_id", "ascending"), ("k", "ascending")])
    given.tick(table.num_rows)
    counts = collections.Counter(f"response_{k + 1}" for k in table["k"].to_pylist())
    return ShardOutput({"candidates": table.combine_chunks()}, dict(counts))


# --- reviewing --------------------------------------------------------------------------------------------------------


async def review_shard(given: ShardInput) -> ShardOutput:
    """The reviews of one shard's last responses, ordered by prompt and reviewer; no row where there is no response."""
    settings: _Review = given.settings
    messages = {row["prompt_id"]: row["messages"] for row in given.tables["prompts"].to_pylist()}
    rows = await all_of(
        _review_one(given, settings, last, messages[last["prompt_id"]], reviewer)
        for last in given.tables["last"].to_pylist()
        if last["response"] is not None
        for reviewer in settings.reviewers
    )
    return ShardOutput({"reviews": to_table(rows, REVIEWS)}, review_counts(rows))


async def _review_one(
    given: ShardInput,
    settings: _Review,
    last: Mapping[str, Any],
    messages: Sequence[Message],
    reviewer: ReviewerSettings,
) -> dict[str, Any]:
    sampling = reviewer.sampling or settings.sampling
    found = await reviewed(given, last, messages, reviewer, settings.template, sampling, settings.asking)
    given.tick(1)
    return review_row(last, reviewer.name, settings.iteration, found)


async def reviewed(
    given: ShardInput,
    answer: Mapping[str, Any],
    messages: Sequence[Message],
    reviewer: ReviewerSettings,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: ReviewAsking,
    sample: int = 0,
) -> Review:
    """One review of an answer (a row with prompt_id and response)."""
    assert given.engine is not None
    engine = given.engine.bound(answer["prompt_id"], f"review/{reviewer.name}")
    found = await review(engine, messages, answer["response"], template, sampling, asking, reviewer.focus, sample)
    if found.parse_status != "too_long":
        given.watch(f"reviewer {reviewer.name}", found.parse_status in READ_STATUSES)
    return found


def review_row(answer: Mapping[str, Any], reviewer: str, iteration: int, found: Review, sample: int = 0) -> dict:
    """A row of schema REVIEWS."""
    return {
        "review_id": digest(["review", answer["candidate_id"], reviewer, iteration, sample]),
        "candidate_id": answer["candidate_id"],
        "prompt_id": answer["prompt_id"],
        "reviewer": reviewer,
        "iteration": iteration,
        "feedback": found.feedback,
        "score": found.score,
        "reason": found.reason,
        "parse_status": found.parse_status,
        "raw": found.raw,
    }


def review_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Reviews by reviewer and status; those that want no change are counted beside it."""
    counts: dict[str, int] = collections.Counter()
    for row in rows:
        counts[f"{row['reviewer']}.{row['parse_status']}"] += 1
        counts[f"{row['reviewer']}.nothing_to_improve"] += row["feedback"] == ""
    return dict(counts)

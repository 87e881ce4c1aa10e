"""The feedback loop as stages that take turns: generate-1 → review-1 → generate-2 → review-2 → … → generate-N.

Only one model has to be loaded at a time, and a prompt whose loop has ended gets no further rows. The next step of a
loop follows from its reviews by `feedback_loop.next_step`, as in the coroutine of that module.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.feedback_loop import (
    FeedbackTemplates,
    History,
    Review,
    ReviewAsking,
    Stop,
    feedback_text,
    load_feedback_templates,
    next_step,
    review,
    revision_messages,
)
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.templates import RoleTemplate
from ray_pipeline.config.settings import Settings, over, refuse_repeated
from ray_pipeline.data.candidates import candidate_row, generated
from ray_pipeline.engines.base import ChatEngine, Message, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, Skip, count_by, reply_status
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import derived_seed, digest
from ray_pipeline.store.schemas import CANDIDATES, REVIEWS

_PUBLISHED = SamplingSettings(temperature=0.0, max_tokens=1024)


class ReviewerSettings(Settings):
    """One reviewer: its name in the tables, its model, and its focus."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="name in the tables")
    model: str = Field("reviewer", description="a key of `models`")
    focus: str = Field("", description="aspect to review; default: the template's own question")
    sampling: SamplingSettings | None = Field(None, description="default: `reviewing` of the block")


class LoopRules(Settings):
    """Rules of a feedback loop, independent of its participants."""

    responses: int = Field(
        3, ge=1, le=26, description="N, the maximum number of responses per prompt; all but the last are reviewed"
    )
    seed: int = Field(0, description="seed of all sampling in this block")
    sampling: Annotated[SamplingSettings, over(_PUBLISHED)] = Field(
        _PUBLISHED, description="for responses and revisions; `reviewing` is for reviews"
    )
    reviewing: Annotated[SamplingSettings, over(_PUBLISHED)] = _PUBLISHED
    asking: ReviewAsking = ReviewAsking()
    attributed: bool = Field(False, description="name the reviewer above its feedback, where there are several")
    history: History = Field(
        "last", description="what a revision is shown: the last response with its feedback, or all of them"
    )
    templates: str = Field("default", description="built-in name or YAML file of the texts for reviewers and generator")

    def texts(self) -> FeedbackTemplates:
        return load_feedback_templates(self.templates)


class LoopSettings(LoopRules):
    """The `loop` block: its rules and participants."""

    generator: str = Field("generator", description="a key of `models`")
    reviewers: tuple[ReviewerSettings, ...] = Field((ReviewerSettings(name="reviewer"),), min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> LoopSettings:
        refuse_repeated(self.names, "reviewers")
        seen: dict[str, str] = {}
        for reviewer in self.reviewers:
            call = reviewer.model_dump_json(exclude={"name"})
            if call in seen:
                raise ValueError(
                    f"reviewers {seen[call]} and {reviewer.name} are the same: one model, focus and sampling; "
                    "change one of them"
                )
            seen[call] = reviewer.name
        return self

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.reviewers]

    @property
    def review_models(self) -> list[str]:
        """Keys of the models that review, in the order of the reviewers."""
        return list(dict.fromkeys(r.model for r in self.reviewers))


def feedback_stages(
    settings: LoopSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    *,
    prefix: str = "",
    ending: str = "",
    first: Stage | None = None,
    policy: ModelSettings | None = None,
    train: Stage | None = None,
) -> tuple[Stage, list[Stage], list[Stage]]:
    """The loop over all prompts.

    Args:
        prefix, ending: before and after the names of the stages, where a workflow has several loops.
        first: the stage of the first responses, where several loops share it.
        policy: who generates, made by the stage `train`; default: the model of `generator`.

    Returns:
        A stage with all responses as candidates (k: which response of its prompt, from 0), the stages that wrote them,
        and those that wrote the reviews.
    """
    texts = settings.texts()
    responses: list[Stage] = []
    reviews: list[Stage] = []
    for k in range(settings.responses):
        if k == 0 and first is not None:
            responses.append(first)
            continue
        inputs = {"prompts": prompts}
        if k:
            reviews += review_stages(
                REVIEW,
                _Review(sampling=settings.reviewing, template=texts.review, asking=settings.asking, iteration=k - 1),
                settings,
                models,
                {"prompts": prompts, "last": responses[-1]},
                f"{prefix}review-{k}{ending}",
            )
            inputs |= {"last": responses[-1], **{f"reviews/{stage.name}": stage for stage in reviews}}
            if settings.history == "all":
                inputs |= {f"earlier/{stage.name}": stage for stage in responses[:-1]}
        generate = _Generate.part_of(
            settings,
            k=k,
            revise=texts.revise if k else "",
            reviewers=tuple(settings.names) if k else (),
            attributed=settings.attributed and k > 0,
            history=settings.history if k else "last",
        )
        model, name = policy or models[settings.generator], f"{prefix}generate-{k + 1}{ending}"
        responses.append(GENERATE.stage(name, generate, model, inputs, holds="turns", train=train))
    joined = Stage(
        name=f"{prefix}candidates{ending}",
        work=ShardWork(function=join_shard, tables=("candidates",)),
        config=None,
        inputs={stage.name: stage for stage in responses},
    )
    return joined, responses, reviews


# --- generating -------------------------------------------------------------------------------------------------------


class _Generate(Settings):
    k: int
    seed: int
    sampling: SamplingSettings
    revise: str
    reviewers: tuple[str, ...]
    attributed: bool = False
    history: History = "last"


class _Turn(NamedTuple):
    prompt_id: str
    messages: list[Message]


def _turns(shard: ShardTables, settings: _Generate) -> Iterator[_Turn | Skip]:
    """The messages that response number k of each prompt answers; loops that have ended are counted."""
    messages = shard.messages()
    if settings.k == 0:
        yield from (_Turn(prompt, turns) for prompt, turns in messages.items())
        return
    reviews = reviews_by_prompt(review_rows(shard), settings.reviewers)
    before: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for row in (row for table in shard.under("earlier/") for row in table.to_pylist()):
        before[row["prompt_id"]][row["k"]] = row["response"]
    for last in shard.rows("last"):
        prompt = last["prompt_id"]
        of_prompt = reviews.get(prompt, [])
        _, stop = what_next(last, of_prompt)
        if stop is not None:
            yield Skip(f"ended.{stop}")
            continue
        said = [feedback_text(of_response, settings.reviewers, settings.attributed) for of_response in of_prompt]
        earlier = [(before[prompt][k], said[k]) for k in sorted(before[prompt])]
        yield _Turn(prompt, revision_messages(messages[prompt], last["response"], said[-1], settings.revise, earlier))


async def _generate(engine: ChatEngine, settings: _Generate, turn: _Turn) -> Outcome:
    seed = derived_seed("response", settings.seed, turn.prompt_id, settings.k)
    row = await response_row(engine, turn.prompt_id, turn.messages, settings.sampling.sampling(seed=seed), settings.k)
    return Outcome({"candidates": [row]}, generated("the generator", row))


async def response_row(engine: ChatEngine, prompt: str, messages: Sequence[Message], sampling: Sampling, k: int) -> Row:
    """A row of schema CANDIDATES. Its id depends on all messages, so revisions by other feedback differ."""
    conversation = digest(["asked", *([m["role"], m["content"]] for m in messages)])
    return await candidate_row(engine, prompt, messages, sampling, {**sampling.key(), "asked": conversation}, k)


GENERATE = Asking(
    tables={"candidates": CANDIDATES},
    items=_turns,
    ask=_generate,
    role=lambda settings, turn: f"generate/{settings.k + 1}",
    counts=count_by("candidates", "finish_reason"),
)


def review_rows(shard: ShardTables) -> list[Row]:
    """The reviews of all review stages, ordered by role."""
    return [row for table in shard.under("reviews/") for row in table.to_pylist()]


def reviews_by_prompt(rows: Sequence[Mapping[str, Any]], reviewers: Sequence[str]) -> dict[str, list[list[Review]]]:
    """By prompt_id, the reviews of its first, second … response, each list in the order of the reviewers.

    Raises:
        KeyError: a review is by an unknown reviewer.
        ValueError: a response lacks a review; the message names prompt and response.
    """
    place = {name: number for number, name in enumerate(reviewers)}
    found: dict[str, dict[int, dict[int, Review]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows:
        one = Review(row["feedback"], row["score"], row["reason"], row["parse_status"], row["raw"])
        found[row["prompt_id"]][row["iteration"]][place[row["reviewer"]]] = one
    for prompt, of_prompt in found.items():
        for iteration in range(len(of_prompt)):
            if len(of_prompt.get(iteration, ())) != len(place):
                raise ValueError(
                    f"reviews: response {iteration} of prompt {prompt!r} was not reviewed by all reviewers"
                )
    return {
        prompt: [[by[n] for n in sorted(by)] for _, by in sorted(of_prompt.items())]
        for prompt, of_prompt in found.items()
    }


def what_next(last: Mapping[str, Any], reviews: Sequence[Sequence[Review]]) -> tuple[list[str], Stop | None]:
    """All feedback of a loop, what the next revision uses included, and why the loop ends, if it does.

    Args:
        last: row of the last response, with `response` and `k`.
        reviews: of every response up to it.
    """
    feedback: list[str] = []
    for of_response in reviews:
        step, stop = next_step(of_response, feedback)
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


class Reviewing(Settings):
    """What reviews depend on, beside the iteration or the number of samples."""

    reviewers: tuple[ReviewerSettings, ...] = ()
    sampling: SamplingSettings
    template: RoleTemplate
    asking: ReviewAsking


class _Review(Reviewing):
    iteration: int


class ReviewItem(NamedTuple):
    """One reviewer of one answer, a row of schema CANDIDATES; `sample` is which of several reviews it is."""

    prompt_id: str
    messages: list[Message]
    answer: Row
    reviewer: ReviewerSettings
    sampling: SamplingSettings
    iteration: int
    sample: int = 0


def _reviews(shard: ShardTables, settings: _Review) -> Iterator[ReviewItem]:
    messages = shard.messages()
    for last in shard.rows("last"):
        if last["response"] is not None:
            prompt = last["prompt_id"]
            for reviewer in settings.reviewers:
                sampling = reviewer.sampling or settings.sampling
                yield ReviewItem(prompt, messages[prompt], last, reviewer, sampling, settings.iteration)


async def review_one(engine: ChatEngine, settings: Reviewing, item: ReviewItem) -> Outcome:
    """One review as a row of schema REVIEWS."""
    answer, name = item.answer, item.reviewer.name
    result = await review(
        engine,
        item.messages,
        answer["response"],
        settings.template,
        item.sampling,
        settings.asking,
        item.reviewer.focus,
        item.sample,
    )
    row = {
        "review_id": digest(["review", answer["candidate_id"], name, item.iteration, item.sample]),
        "candidate_id": answer["candidate_id"],
        "prompt_id": item.prompt_id,
        "reviewer": name,
        "iteration": item.iteration,
        **vars(result),
    }
    return Outcome({"reviews": [row]}, reply_status(f"reviewer {name}", result.parse_status))


def review_role(settings: Settings, item: ReviewItem) -> str:
    return f"review/{item.reviewer.name}"


def review_counts(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Reviews by reviewer and status, and those that ask for no change."""
    counts: dict[str, int] = collections.Counter()
    for row in rows["reviews"]:
        counts[f"{row['reviewer']}.{row['parse_status']}"] += 1
        counts[f"{row['reviewer']}.nothing_to_improve"] += row["feedback"] == ""
    return dict(counts)


REVIEW = Asking(tables={"reviews": REVIEWS}, items=_reviews, ask=review_one, role=review_role, counts=review_counts)


V = TypeVar("V", bound=Reviewing)


def review_stages(
    asking: Asking[V, ReviewItem],
    settings: V,
    loop: LoopSettings,
    models: Mapping[str, ModelSettings],
    inputs: Mapping[str, Stage],
    group: str,
    holds: str = "",
) -> list[Stage]:
    """One stage per model that reviews; a review finds its answer by id, whichever stage wrote it.

    Args:
        settings: without reviewers; each stage gets those of its model.
        holds: role of the reviews, see `Stage.role`.
    """
    stages = []
    for key in loop.review_models:
        own = settings.model_copy(update={"reviewers": tuple(r for r in loop.reviewers if r.model == key)})
        name = group if len(loop.review_models) == 1 else f"{group}-{key}"
        stages.append(asking.stage(name, own, models[key], inputs, group=group, holds=holds))
    return stages

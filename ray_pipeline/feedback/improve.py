"""Data for multi-agent improvement: preferences over revisions given the feedback, and over the reviews themselves.

    responses → reviews, several of each → revisions, several of each review → judges → rows

Of the revisions of one review, the one that scored highest is chosen over the others: the generator learns to use
feedback. Of the reviews of one response, the one whose revisions scored highest is chosen: a reviewer learns to give
feedback that helps. A review that asks for no change leaves the response as it is, and has the response's score.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.feedback_loop import FeedbackTemplates, ReviewAsking, review_messages, revision_messages
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import MEAN, JuryRule, jury_scores
from ray_pipeline.agents.templates import RoleTemplate
from ray_pipeline.data.columnar import flat_counts, token_counter
from ray_pipeline.data.datasets import DatasetsConfig, Encode, dpo_rows, kto_rows
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.base import Message
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.feedback.loop import (
    LoopSettings,
    ReviewerSettings,
    drawn,
    review_counts,
    review_row,
    review_tables,
    reviewed,
)
from ray_pipeline.feedback.select import accept_best
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import derived_seed, digest, prompt_id
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, READ_STATUSES, REVIEWS, REVISIONS, VERDICTS, to_table
from ray_pipeline.store.settings import Settings

_WARM = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=1024)
#: The judge's name in verdicts on reviews: what their revisions scored.
_BY_REVISIONS = "revisions"


class ImproveSettings(Settings):
    """The `improve` block.

    Attributes:
        prompts: prompts of these data sets; default: those of the run.
        reviews: how many reviews each reviewer gives a response.
        revisions: how many revisions answer each review.
        sampling: of the revisions; `reviewing` is of the reviews. The first responses are drawn as in the loop.
    """

    prompts: PromptsConfig | None = None
    reviews: int = Field(2, ge=1, le=64)
    revisions: int = Field(2, ge=1, le=64)
    seed: int = 0
    sampling: SamplingSettings = _WARM
    reviewing: SamplingSettings = _WARM

    @field_validator("sampling", "reviewing", mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        """A block that sets one key keeps the other defaults."""
        return {**_WARM.model_dump(), **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _differ(self) -> ImproveSettings:
        for count, sampling, key in (
            (self.reviews, self.reviewing, "reviewing"),
            (self.revisions, self.sampling, "sampling"),
        ):
            if count > 1 and sampling.temperature == 0:
                raise ValueError(f"{key}.temperature is 0, so all {count} would be the same; raise it or ask for one")
        return self


class _Draw(Settings):
    reviewers: tuple[ReviewerSettings, ...]
    sampling: SamplingSettings
    template: RoleTemplate
    asking: ReviewAsking
    number: int


class _Revise(Settings):
    revise: str
    sampling: SamplingSettings
    seed: int
    number: int


class _Rows(Settings):
    datasets: DatasetsConfig
    judges: tuple[str, ...]
    jury: JuryRule
    texts: FeedbackTemplates
    asking: ReviewAsking
    focus: dict[str, str]
    tokenizer: TokenizerSettings
    every_rejected: bool


@dataclasses.dataclass(frozen=True)
class Branches:
    """Stages of the second kind: first responses, reviews (one stage a model), and revisions of every review."""

    responses: Stage
    reviews: list[Stage]
    revisions: Stage


def branch_stages(
    settings: ImproveSettings,
    loop: LoopSettings,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    responses: Stage,
) -> Branches:
    """Reviews and revisions of first responses.

    Args:
        responses: candidates of `prompts`, one each.
    """
    texts = loop.texts()
    reviews = []
    for key in loop.review_models:
        given = _Draw(
            reviewers=tuple(r for r in loop.reviewers if r.model == key),
            sampling=settings.reviewing,
            template=texts.review,
            asking=loop.asking,
            number=settings.reviews,
        )
        name = "improve-review" if len(loop.review_models) == 1 else f"improve-review-{key}"
        inputs = {"prompts": prompts, "responses": responses}
        reviews.append(
            llm_stage(name, draw_reviews, ("reviews",), given, models[key], failure, inputs, group="improve-review")
        )
    revise = _Revise(revise=texts.revise, sampling=settings.sampling, seed=settings.seed, number=settings.revisions)
    inputs = {"prompts": prompts, "responses": responses, **{f"reviews/{stage.name}": stage for stage in reviews}}
    revisions = llm_stage(
        "improve-revise", draw_revisions, ("revisions",), revise, models[loop.generator], failure, inputs
    )
    return Branches(responses, reviews, revisions)


async def draw_reviews(given: ShardInput) -> ShardOutput:
    """All reviews of one shard's responses, ordered by prompt, reviewer and sample."""
    settings: _Draw = given.settings
    messages = _messages(given.tables["prompts"])
    rows = await all_of(
        _draw_review(given, settings, answer, messages[answer["prompt_id"]], reviewer, sample)
        for answer in given.tables["responses"].to_pylist()
        if answer["response"] is not None
        for reviewer in settings.reviewers
        for sample in range(settings.number)
    )
    return ShardOutput({"reviews": to_table(rows, REVIEWS)}, review_counts(rows))


async def _draw_review(
    given: ShardInput,
    settings: _Draw,
    answer: Mapping[str, Any],
    messages: Sequence[Message],
    reviewer: ReviewerSettings,
    sample: int,
) -> dict[str, Any]:
    found = await reviewed(
        given, answer, messages, reviewer, settings.template, settings.sampling, settings.asking, sample
    )
    given.tick(1)
    return review_row(answer, reviewer.name, answer["k"], found, sample)


async def draw_revisions(given: ShardInput) -> ShardOutput:
    """Revisions of every review that asks for a change, ordered by prompt, review and number."""
    settings: _Revise = given.settings
    messages = _messages(given.tables["prompts"])
    answers = {row["candidate_id"]: row for row in given.tables["responses"].to_pylist()}
    reviews = sorted((r for r in review_tables(given.tables) if r["feedback"]), key=_review_key)
    place: dict[str, int] = collections.Counter()
    asked = []
    for said in reviews:
        answer = answers[said["candidate_id"]]
        prompt = said["prompt_id"]
        turns = revision_messages(messages[prompt], answer["response"], said["feedback"], settings.revise)
        for number in range(settings.number):
            place[prompt] += 1
            asked.append((said, turns, number, answer["k"] + place[prompt]))
    rows = await all_of(_revise(given, settings, *one) for one in asked)
    counts = collections.Counter(row["finish_reason"] for row in rows)
    return ShardOutput({"revisions": to_table(rows, REVISIONS)}, dict(counts))


def _review_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["prompt_id"], row["reviewer"], row["review_id"]


async def _revise(
    given: ShardInput, settings: _Revise, said: Mapping[str, Any], turns: Sequence[Message], number: int, k: int
) -> dict[str, Any]:
    seed = derived_seed("revision", settings.seed, said["review_id"], number)
    row = await drawn(given, said["prompt_id"], turns, settings.sampling, seed, k, "improve/revise")
    given.tick(1)
    return {**row, "review_id": said["review_id"]}


def _messages(prompts: pa.Table) -> dict[str, list[Message]]:
    return {row["prompt_id"]: row["messages"] for row in prompts.select(["prompt_id", "messages"]).to_pylist()}


# --- rows -------------------------------------------------------------------------------------------------------------


def improvement_rows(
    what: str,
    settings: DatasetsConfig,
    judges: Sequence[str],
    jury: JuryRule,
    every_rejected: bool,
    loop: LoopSettings,
    model: ModelSettings,
    prompts: Stage,
    branches: Branches,
    verdicts: Sequence[Stage],
) -> Stage:
    """Training rows of `revisions` or of `reviews`.

    Args:
        model: the generator or a reviewer, whose tokenizer measures the rows.
        verdicts: on the first responses and on all revisions.
    """
    given = _Rows(
        datasets=settings,
        judges=tuple(judges),
        jury=jury,
        texts=loop.texts(),
        asking=loop.asking,
        focus={r.name: r.focus for r in loop.reviewers},
        tokenizer=model.tokenizer,
        every_rejected=every_rejected,
    )
    return Stage(
        name=f"rows-{what}",
        group="improve",
        work=ShardWork(
            function=revision_shard if what == "revisions" else review_rows_shard,
            tables=settings.row_kinds,
            settings=given,
        ),
        config={
            **given.decisive(exclude={"datasets", "tokenizer"}),
            "chat_template_args": model.chat_template_args,
            **settings.decisive(exclude={"kinds", "seed", "rows_per_file"}),
            "tables": list(settings.row_kinds),
        },
        inputs={
            "prompts": prompts,
            "responses": branches.responses,
            "revisions": branches.revisions,
            **{f"reviews/{stage.name}": stage for stage in branches.reviews},
            **{f"verdicts/{stage.name}": stage for stage in verdicts},
        },
        external=model.weights(),
    )


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Completions to choose between, in the form of a run's own tables. `prompts` has a row for each conversation;
    `origin` says of which prompt of the run each is."""

    prompts: pa.Table
    candidates: pa.Table
    verdicts: pa.Table
    origin: dict[str, str]


def revision_shard(given: ShardInput) -> ShardOutput:
    settings: _Rows = given.settings
    made = over_revisions(
        given.tables["prompts"],
        given.tables["responses"],
        review_tables(given.tables),
        given.tables["revisions"],
        _verdicts(given.tables),
        settings.texts.revise,
    )
    return _shard_rows(given, made, settings.judges, settings.jury)


def review_rows_shard(given: ShardInput) -> ShardOutput:
    settings: _Rows = given.settings
    made = over_reviews(
        given.tables["prompts"],
        given.tables["responses"],
        review_tables(given.tables),
        given.tables["revisions"],
        _verdicts(given.tables),
        settings.judges,
        settings.jury,
        lambda messages, response, reviewer: review_messages(
            messages, response, settings.texts.review, settings.asking, settings.focus[reviewer]
        ),
    )
    return _shard_rows(given, made, (_BY_REVISIONS,), MEAN)


def _verdicts(tables: Mapping[str, pa.Table]) -> pa.Table:
    return pa.concat_tables([tables[role] for role in sorted(tables) if role.startswith("verdicts/")])


def _shard_rows(given: ShardInput, made: Preferences, judges: Sequence[str], jury: JuryRule) -> ShardOutput:
    settings: _Rows = given.settings
    encode = token_counter(settings.tokenizer)
    tables, counts = preference_rows(made, judges, jury, settings.datasets, encode, settings.every_rejected)
    given.tick(made.candidates.num_rows)
    return ShardOutput(tables, counts)


def preference_rows(
    made: Preferences,
    judges: Sequence[str],
    jury: JuryRule,
    config: DatasetsConfig,
    encode: Encode,
    every_rejected: bool,
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """KTO and DPO rows by the selection of a run: the best completion of a conversation over the others.

    The rows' prompt_id is that of the run's prompt; their prompt is the whole conversation.
    """
    decisions = accept_best(made.candidates, made.verdicts, judges, jury)
    arguments = (made.prompts, made.candidates, made.verdicts, decisions, config, encode)
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    for kind in config.row_kinds:
        table, found = kto_rows(*arguments, judges) if kind == "kto" else dpo_rows(*arguments, every_rejected)
        at = table.schema.get_field_index("prompt_id")
        origin = pa.array([made.origin[name] for name in table["prompt_id"].to_pylist()], pa.string())
        tables[kind] = table.set_column(at, table.schema.field(at), origin)
        counts |= flat_counts(found, f"{kind}.")
    return tables, counts


def over_revisions(
    prompts: pa.Table,
    responses: pa.Table,
    reviews: Sequence[Mapping[str, Any]],
    revisions: pa.Table,
    verdicts: pa.Table,
    revise: str,
) -> Preferences:
    """Revisions given the feedback: the conversation is the prompt, the response, and what the review said of it."""
    asked = {row["prompt_id"]: row for row in prompts.to_pylist()}
    answers = {row["candidate_id"]: row for row in responses.to_pylist()}
    said = {row["review_id"]: row for row in reviews}
    conversations: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    candidates = []
    for row in revisions.to_pylist():
        review = said[row.pop("review_id")]
        prompt, answer = asked[row["prompt_id"]], answers[review["candidate_id"]]
        turns = revision_messages(prompt["messages"], answer["response"], review["feedback"], revise)
        name = _conversation(conversations, prompt, turns)
        origin[name] = row["prompt_id"]
        candidates.append({**row, "prompt_id": name})
    ids = pa.array([row["candidate_id"] for row in candidates], pa.string())
    of_them = verdicts.filter(pc.is_in(verdicts["candidate_id"], value_set=ids))
    return Preferences(
        to_table(list(conversations.values()), PROMPTS), to_table(candidates, CANDIDATES), of_them, origin
    )


def over_reviews(
    prompts: pa.Table,
    responses: pa.Table,
    reviews: Sequence[Mapping[str, Any]],
    revisions: pa.Table,
    verdicts: pa.Table,
    judges: Sequence[str],
    jury: JuryRule,
    question: Any,
) -> Preferences:
    """Reviews of one response, scored by what followed them.

    Args:
        question: (prompt messages, response, reviewer) → what the reviewer was asked.

    Equal replies to the same question are one completion, whose score is the mean over all revisions that followed
    any of them. A reply that was not read, or of which a revision has no score, has none.
    """
    asked = {row["prompt_id"]: row for row in prompts.to_pylist()}
    answers = {row["candidate_id"]: row for row in responses.to_pylist()}
    scores = _scores(verdicts, judges, jury)
    followed: dict[str, list[str]] = collections.defaultdict(list)
    for row in revisions.select(["candidate_id", "review_id"]).to_pylist():
        followed[row["review_id"]].append(row["candidate_id"])
    conversations: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    replies: dict[tuple[str, str], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for review in sorted(reviews, key=_review_key):
        if review["parse_status"] not in READ_STATUSES or review["raw"] is None:
            continue
        prompt, answer = asked[review["prompt_id"]], answers[review["candidate_id"]]
        turns = question(prompt["messages"], answer["response"], review["reviewer"])
        name = _conversation(conversations, prompt, turns)
        origin[name] = review["prompt_id"]
        replies[name, review["raw"]].append(review)
    candidates: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    for (name, raw), same in replies.items():
        ids = [after for r in same for after in (followed[r["review_id"]] if r["feedback"] else [r["candidate_id"]])]
        values = [scores.get(after) for after in ids]
        read = [value for value in values if value is not None]
        score = sum(read) / len(read) if values and len(read) == len(values) else None
        ids_of_row = {"candidate_id": same[0]["review_id"], "prompt_id": name}
        candidates.append(
            {
                **ids_of_row,
                "k": len(candidates),
                "seed": 0,
                "response": raw,
                "finish_reason": "stop",
                "generator": same[0]["reviewer"],
            }
        )
        status = "ok" if score is not None else "unparsed"
        made.append({**ids_of_row, "judge": _BY_REVISIONS, "score": score, "parse_status": status})
    return Preferences(
        to_table(list(conversations.values()), PROMPTS),
        to_table(candidates, CANDIDATES),
        to_table(made, VERDICTS),
        origin,
    )


def _conversation(known: dict[str, dict[str, Any]], prompt: Mapping[str, Any], turns: Sequence[Message]) -> str:
    """Id of a conversation, held out exactly when its prompt is. Equal ones of one prompt are one."""
    name = digest(["conversation", prompt["prompt_id"], prompt_id(turns)])
    known.setdefault(name, {**prompt, "prompt_id": name, "messages": list(turns)})
    return name


def _scores(verdicts: pa.Table, judges: Sequence[str], jury: JuryRule) -> dict[str, float]:
    """The jury's score of every answer that all judges could read; judges vote among all such answers of a prompt."""
    found: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in verdicts.select(["prompt_id", "candidate_id", "judge", "score", "parse_status"]).to_pylist():
        if row["judge"] in judges and row["parse_status"] in READ_STATUSES and row["score"] is not None:
            found[row["prompt_id"]][row["candidate_id"]][row["judge"]] = row["score"]
    scores: dict[str, float] = {}
    for answers in found.values():
        read = {name: by for name, by in answers.items() if len(by) == len(judges)}
        if read:
            pooled = jury_scores({judge: [by[judge] for by in read.values()] for judge in judges}, jury)
            scores |= dict(zip(read, pooled, strict=True))
    return scores

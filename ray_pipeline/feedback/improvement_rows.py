"""Rows of multi-agent improvement: preferences over revisions given the feedback, and over the reviews themselves.

Of the revisions of one review, the one with the highest score is chosen over the others: the generator learns to use
feedback. Of the reviews of one response, the one whose revisions scored highest is chosen: a reviewer learns to give
helpful feedback. A review that asks for no change leaves the response as it is and gets the response's score.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.agents.feedback_loop import FeedbackTemplates, ReviewAsking, review_messages, revision_messages
from ray_pipeline.agents.jurors import MEAN, JuryRule, jury_scores
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.gate import Cut
from ray_pipeline.data.rows import flat_counts
from ray_pipeline.data.tokens import Encode, counter_identity, token_counter
from ray_pipeline.engines.base import Message
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.feedback.improve import Branches, review_key
from ray_pipeline.feedback.loop import LoopSettings, review_rows
from ray_pipeline.feedback.pick import accept_best
from ray_pipeline.feedback.select import SelectSettings
from ray_pipeline.graph.asking import Row, ShardTables
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import digest, prompt_id
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, READ_STATUSES, VERDICTS, to_table

#: The judge's name in verdicts on reviews: what their revisions scored.
_BY_REVISIONS = "revisions"


class _Rows(Settings):
    datasets: DatasetsConfig
    judges: tuple[str, ...]
    jury: JuryRule
    texts: FeedbackTemplates
    asking: ReviewAsking
    focus: dict[str, str]
    tokenizer: TokenizerSettings | None
    every_rejected: bool
    cut: Cut


def improvement_rows(
    what: str,
    settings: DatasetsConfig,
    judges: Sequence[str],
    select: SelectSettings,
    loop: LoopSettings,
    model: ModelSettings | None,
    prompts: Stage,
    branches: Branches,
    verdicts: Sequence[Stage],
) -> Stage:
    """Training rows of `revisions` or of `reviews`.

    Args:
        select: how the run picks a prompt's best response, and so the best revision or review.
        model: the generator or a reviewer, whose tokenizer counts the rows' tokens; None: they are estimated.
        verdicts: on the first responses and on all revisions.
    """
    given = _Rows(
        datasets=settings,
        judges=tuple(judges),
        jury=select.jury,
        texts=loop.texts(),
        asking=loop.asking,
        focus={r.name: r.focus for r in loop.reviewers},
        tokenizer=None if model is None else model.tokenizer,
        every_rejected=select.pairs == "every_rejected",
        cut=select.cut,
    )
    return Stage(
        name=f"rows-{what}",
        version=3,  # 2: candidates that were cut off and repeated answers are left out; 3: equal rows are counted
        group="improve",
        role="branch rows",
        work=ShardWork(
            function=revision_shard if what == "revisions" else review_rows_shard,
            tables=settings.row_kinds,
            settings=given,
        ),
        config={
            **given.decisive(exclude={"datasets", "tokenizer", "cut"}),
            **({} if select.cut == "exclude" else {"cut": select.cut}),
            **({} if model is None else {"chat_template_args": model.chat_template_args}),
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
        external=counter_identity(model),
    )


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Completions to choose between, in the form of a run's own tables. `prompts` has a row for each conversation;
    `origin` maps it to its prompt in the run. `times`: candidate → how many equal replies it stands for, if not 1."""

    prompts: pa.Table
    candidates: pa.Table
    verdicts: pa.Table
    origin: dict[str, str]
    times: dict[str, int] = dataclasses.field(default_factory=dict)


def revision_shard(given: ShardInput) -> ShardOutput:
    settings: _Rows = given.settings
    made = over_revisions(*_tables(given), settings.texts.revise)
    return _shard_rows(given, made, settings.judges, settings.jury)


def review_rows_shard(given: ShardInput) -> ShardOutput:
    settings: _Rows = given.settings
    made = over_reviews(
        *_tables(given),
        settings.judges,
        settings.jury,
        lambda messages, response, reviewer: review_messages(
            messages, response, settings.texts.review, settings.asking, settings.focus[reviewer]
        ),
    )
    return _shard_rows(given, made, (_BY_REVISIONS,), MEAN)


def _tables(given: ShardInput) -> tuple[pa.Table, pa.Table, list[Row], pa.Table, pa.Table]:
    """Prompts, responses, reviews, revisions and verdicts of a shard."""
    shard = ShardTables(given.tables, given.facts)
    prompts, responses, revisions = (shard.tables[role] for role in ("prompts", "responses", "revisions"))
    return prompts, responses, review_rows(shard), revisions, pa.concat_tables(shard.under("verdicts/"))


def _shard_rows(given: ShardInput, made: Preferences, judges: Sequence[str], jury: JuryRule) -> ShardOutput:
    settings: _Rows = given.settings
    encode = token_counter(settings.tokenizer)
    rules = (settings.datasets, encode, settings.every_rejected, settings.cut)
    tables, counts = preference_rows(made, judges, jury, *rules)
    given.tick(made.candidates.num_rows)
    return ShardOutput(tables, counts)


def preference_rows(
    made: Preferences,
    judges: Sequence[str],
    jury: JuryRule,
    config: DatasetsConfig,
    encode: Encode,
    every_rejected: bool,
    cut: Cut = "exclude",
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """KTO and DPO rows by the selection of a run: the best completion of a conversation over the others.

    The rows' prompt_id is that of the run's prompt; their prompt is the whole conversation.
    """
    decisions = accept_best(made.candidates, made.verdicts, judges, jury, cut)
    arguments = (made.prompts, made.candidates, made.verdicts, decisions, config, encode)
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    for kind in config.row_kinds:
        if kind == "kto":
            table, found = kto_rows(*arguments, judges, made.times)
        else:
            table, found = dpo_rows(*arguments, every_rejected, made.times)
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
    """Revisions given the feedback: a conversation is the prompt, the response and the feedback of its review."""
    asked = {row["prompt_id"]: row for row in prompts.to_pylist()}
    answers = {row["candidate_id"]: row for row in responses.to_pylist()}
    by_id = {row["review_id"]: row for row in reviews}
    conversations: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    candidates = []
    for row in revisions.to_pylist():
        review = by_id[row.pop("review_id")]
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
    question: Callable[[list[Message], str, str], list[Message]],
) -> Preferences:
    """Reviews of one response, scored by the revisions that followed them.

    Args:
        question: (prompt messages, response, reviewer) → messages that the reviewer replied to.

    Equal replies to the same question are one completion, whose score is the mean over all revisions that followed
    any of them. An unread reply, and one with a revision without a score, has none.
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
    for review in sorted(reviews, key=review_key):
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
        {same[0]["review_id"]: len(same) for same in replies.values()},
    )


def _conversation(known: dict[str, dict[str, Any]], prompt: Mapping[str, Any], turns: Sequence[Message]) -> str:
    """Id of a conversation; it is held out exactly when its prompt is. Equal conversations of a prompt share one id."""
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

"""Judging, criticising and improving the rows of a frame by the agents of `ray_pipeline.agents`, many calls at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml

from ray_pipeline.agents import feedback_loop as loops
from ray_pipeline.agents import judges
from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings
from ray_pipeline.agents.templates import Layout, load_templates
from ray_pipeline.api.engines import CONCURRENCY, bound, settings_of, templates_of
from ray_pipeline.api.frames import Frame, column_names, give, need, rows_with_ids
from ray_pipeline.api.loop import each
from ray_pipeline.config.settings import refuse_repeated
from ray_pipeline.engines.base import ChatEngine, Completion
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import CRITIQUES, VERDICTS, to_table


def judge(
    frame: Frame,
    engine: ChatEngine,
    rubrics: Sequence[Rubric | Mapping[str, Any] | str] | Mapping[str, str] | None = None,
    *,
    templates: str | None = None,
    layout: Layout = "shared_first",
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: JudgeAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Score every response on every rubric.

    Args:
        frame: columns `prompt` (text, or messages with role and content; also as `messages`) and `response` (text;
            null is judged by nobody), and if you have them `prompt_id` and `candidate_id`.
        engine: from `open_engine`, or any `ChatEngine`.
        rubrics: `Rubric`s or their keys (`{"name": "safety", "text": "…", "low": 1, "high": 10}`), names alone, or
            name → text; default: helpfulness, factuality and conciseness as published.
        templates: built-in name or YAML file of the judge's prompt; default: what the engine's model understands.
        sampling, asking: as the keys of the same name in the `judge` block (`{"max_tokens": 512}`, `{"retries": 2}`).
        concurrency: maximum number of responses and rubrics in work at once.

    Returns:
        Rows × rubrics verdicts: candidate_id, prompt_id, judge, score (float; null when unread), expected_score,
        reason, parse_status (ok, repaired, unparsed, truncated, too_long, error) and raw, by row and rubric.

    Raises:
        ColumnError: `prompt` or `response` is missing.
        ValueError: a rubric or a setting is wrong.
    """
    found = _rubrics(rubrics)
    name = templates_of(engine, templates)
    template = load_templates(name).judge
    how = settings_of(SamplingSettings, sampling, name, "sampling"), settings_of(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame")

    async def one(row: Mapping[str, Any], rubric: Rubric) -> dict[str, Any]:
        if row["response"] is None:
            verdict = judges.Verdict(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], f"judge/{rubric.name}")
            verdict = await judges.judge(own, row["messages"], row["response"], rubric, template, *how, layout)
        return {**_ids(row, "candidate_id"), "judge": rubric.name, **dataclasses.asdict(verdict)}

    made = each([(row, rubric) for row in rows for rubric in found], one, concurrency)
    return give(to_table(made, VERDICTS), frame)


def critique(
    frame: Frame,
    engine: ChatEngine,
    *,
    templates: str | None = None,
    layout: Layout | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: JudgeAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Say of every response whether the way to it is flawed, and how.

    Args:
        frame, engine, templates, sampling, asking, concurrency: as for `judge`.

    Returns:
        One critique a row, in the frame's order and with its index: candidate_id, prompt_id, flawed (bool; null when
        unread), failure_type (circular, unsupported, contradictory, unspecified, none), reason, parse_status, raw.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(engine, templates)
    template = load_templates(name).critic
    # The pocket's critic was trained on one layout; with one call a candidate, others share the rubric alone.
    order: Layout = layout or ("shared_first" if name == "pocket" else "rubric_first")
    how = settings_of(SamplingSettings, sampling, name, "sampling"), settings_of(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame")

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["response"] is None:
            found = judges.Critique(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], "critic")
            found = await judges.critique(own, row["messages"], row["response"], template, *how, order)
        return {**_ids(row, "candidate_id"), **dataclasses.asdict(found)}

    return give(to_table(each([(row,) for row in rows], one, concurrency), CRITIQUES), frame, same_rows=True)


def feedback_loop(
    frame: Frame,
    generator: ChatEngine,
    reviewers: ChatEngine | Mapping[str, ChatEngine] | None = None,
    *,
    responses: int = 3,
    templates: str | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    reviewing: SamplingSettings | Mapping[str, Any] | None = None,
    asking: loops.ReviewAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Answer each prompt, review the answer, and revise it by the reviews until there is nothing to improve.

    Args:
        frame: column `prompt` (or `messages`).
        generator: answers and revises.
        reviewers: one, or name → engine; default: the generator.
        responses: maximum number of responses to a prompt; one fewer are reviewed.
        templates: built-in name or YAML file of the prompts for reviews and revisions.
        sampling, reviewing: how responses and reviews are drawn.
        asking: keys of a `ReviewAsking` (`{"retries": 2, "scored": True}`).

    Returns:
        One row a response, first to last: candidate_id, prompt_id, prompt, k (0 is the first), response, finish_reason,
        reviews (list of structs reviewer, feedback, score, parse_status; empty for the last) and stop (why the loop
        ended, on its last row: limit, empty, repeated, unread, no_response). `judge` and `gate` take it as it is.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(generator, templates)
    texts = loops.load_feedback_templates(name)
    answer = settings_of(SamplingSettings, sampling, name, "answer")
    how = settings_of(SamplingSettings, reviewing, name, "sampling")
    rules = settings_of(loops.ReviewAsking, asking, name, "review")
    if reviewers is None:
        reviewers = generator
    by_name = reviewers if isinstance(reviewers, Mapping) else {"reviewer": reviewers}
    column = "messages" if "messages" in column_names(frame, "frame") else "prompt"
    need(frame, [column], "frame")
    rows = rows_with_ids(frame, "row_id", [], "frame")

    async def one(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        pid = row["prompt_id"]
        looking = {n: loops.Reviewer(bound(e, pid, f"review/{n}"), how) for n, e in by_name.items()}
        drawn = [
            answer.sampling(seed=derived_seed("loop", pid, k) if answer.temperature > 0 else None)
            for k in range(responses)
        ]
        own = bound(generator, pid, "generator")
        loop = await loops.feedback_loop(own, looking, row["messages"], responses, texts, drawn.__getitem__, rules)
        return _loop_rows(row, loop)

    made = [row for loop in each([(row,) for row in rows], one, concurrency) for row in loop]
    return give(pa.Table.from_pylist(made, schema=_LOOP), frame)


_REVIEW = pa.struct(
    [("reviewer", pa.string()), ("feedback", pa.string()), ("score", pa.float64()), ("parse_status", pa.string())]
)
_LOOP = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("k", pa.int32()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("reviews", pa.list_(_REVIEW)),
        ("stop", pa.string()),
    ]
)


def _loop_rows(row: Mapping[str, Any], loop: loops.Loop) -> list[dict[str, Any]]:
    given: list[Completion | None] = list(loop.responses)
    if loop.stop == "no_response":
        given.append(None)
    rows = []
    for k, reply in enumerate(given):
        said = loop.reviews[k] if k < len(loop.reviews) else {}
        reviews = [
            {"reviewer": n, "feedback": r.feedback, "score": r.score, "parse_status": r.parse_status}
            for n, r in said.items()
        ]
        rows.append(
            {
                "candidate_id": f"{row['row_id']}-{k}",
                "prompt_id": row["prompt_id"],
                "prompt": row["messages"],
                "k": k,
                "response": None if reply is None else reply.text,
                "finish_reason": "error" if reply is None else reply.finish_reason,
                "reviews": reviews,
                "stop": loop.stop if k == len(given) - 1 else None,
            }
        )
    return rows


def _rubrics(given: Sequence[Rubric | Mapping[str, Any] | str] | Mapping[str, str] | None) -> list[Rubric]:
    published = _published_rubrics()
    if given is None:
        return list(published.values())
    if isinstance(given, Mapping):
        given = [{"name": name, "text": text} for name, text in given.items()]
    if isinstance(given, str) or not given:
        raise ValueError("rubrics is a list of rubrics (or name → text) with at least one of them")
    found = []
    for rubric in given:
        if isinstance(rubric, str):
            rubric = published.get(rubric) or Rubric(name=rubric)
        found.append(rubric if isinstance(rubric, Rubric) else Rubric.model_validate(dict(rubric)))
    refuse_repeated((rubric.name for rubric in found), "rubrics")
    return found


def _published_rubrics() -> dict[str, Rubric]:
    """Those of the shipped configuration of DMAPO, where their texts are."""
    import importlib.resources

    text = (importlib.resources.files("configs") / "dmapo.yaml").read_text("utf-8")
    return {r["name"]: Rubric.model_validate(r) for r in yaml.safe_load(text)["judge"]["rubrics"]}


def _ids(row: Mapping[str, Any], key: str) -> dict[str, str]:
    return {key: row[key], "prompt_id": row["prompt_id"]}

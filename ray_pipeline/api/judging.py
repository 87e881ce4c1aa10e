"""Scores and critiques of the rows of a frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ray_pipeline.agents import judges
from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings
from ray_pipeline.agents.templates import Layout, load_templates
from ray_pipeline.agents.ticking import tick
from ray_pipeline.api.calls import CONCURRENCY, each, ids_of, settings_of
from ray_pipeline.api.engines import bound, templates_of
from ray_pipeline.api.frames import Frame, give, rows_with_ids
from ray_pipeline.data.sources.records import Thoughts
from ray_pipeline.engines.base import ChatEngine
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
    thoughts: Thoughts = "split",
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Score every response on every rubric.

    Args:
        frame: columns `prompt` (text, or messages with role and content; also as `messages`) and `response` (text;
            null is not judged); optional: `prompt_id` and `candidate_id`.
        engine: from `open_engine`, or any `ChatEngine`.
        rubrics: `Rubric`s or their keys (`{"name": "safety", "text": "…", "low": 1, "high": 10}`, or with `items` for a
            checklist), names alone, or name → text; default: helpfulness, factuality and conciseness as published.
        templates: built-in name or YAML file of the judge's prompt; default: those that suit the engine's model.
        sampling, asking: the keys of the same name in the `judge` block (`{"max_tokens": 512}`, `{"retries": 2}`).
        thoughts: split: thoughts at the start of a response (`<think>…</think>`) are not judged, and a response that
            ends within them is like null; keep: they are part of the response.
        concurrency: maximum number of concurrent calls.

    Returns:
        One verdict for each row and rubric: candidate_id, prompt_id, judge, score (float; null when unread),
        expected_score, reason, parse_status (ok, repaired, unparsed, truncated, too_long, error) and raw, by row and
        rubric.

    Raises:
        ColumnError: `prompt` or `response` is missing.
        ValueError: a rubric or a setting is invalid.
    """
    found = _rubrics(rubrics)
    name = templates_of(engine, templates)
    texts = load_templates(name)
    if written := [rubric.name for rubric in found if rubric.checklist is not None]:
        raise ValueError(f"rubric {written[0]}: only runs write checklists by a model; set its items instead")
    how = settings_of(SamplingSettings, sampling, name, "sampling"), settings_of(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame", thoughts=thoughts)

    async def one(row: Mapping[str, Any], rubric: Rubric) -> dict[str, Any]:
        if row["response"] is None:
            verdict = judges.Verdict(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], f"judge/{rubric.name}")
            what = own, row["messages"], row["response"], rubric
            if rubric.items:
                verdict = await tick(*what, rubric.items, texts.ticks, *how, layout)
            else:
                verdict = await judges.judge(*what, texts.judge, *how, layout)
        return {**ids_of(row, "candidate_id"), "judge": rubric.name, **judges.columns_of(verdict)}

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
    thoughts: Thoughts = "split",
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Decide for every response whether the reasoning behind it is flawed, and how.

    Args:
        frame, engine, templates, sampling, asking, thoughts, concurrency: as for `judge`.

    Returns:
        One critique for each row, in the frame's order and with its index: candidate_id, prompt_id, flawed (bool;
        null when unread), failure_type (circular, unsupported, contradictory, unspecified, none), reason, parse_status,
        raw.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(engine, templates)
    template = load_templates(name).critic
    # The pocket critic was trained on one layout. Other critics make one call per candidate and share only the rubric.
    order: Layout = layout or ("shared_first" if name == "pocket" else "rubric_first")
    how = settings_of(SamplingSettings, sampling, name, "sampling"), settings_of(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame", thoughts=thoughts)

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["response"] is None:
            found = judges.Critique(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], "critic")
            found = await judges.critique(own, row["messages"], row["response"], template, *how, order)
        return {**ids_of(row, "candidate_id"), **judges.columns_of(found)}

    return give(to_table(each([(row,) for row in rows], one, concurrency), CRITIQUES), frame, same_rows=True)


def _rubrics(given: Sequence[Rubric | Mapping[str, Any] | str] | Mapping[str, str] | None) -> list[Rubric]:
    published = _published_rubrics()
    if given is None:
        return list(published.values())
    if isinstance(given, Mapping):
        given = [{"name": name, "text": text} for name, text in given.items()]
    if isinstance(given, str) or not given:
        raise ValueError("rubrics must be a non-empty list of rubrics, or a mapping name → text")
    found = []
    for rubric in given:
        if isinstance(rubric, str):
            rubric = published.get(rubric) or Rubric(name=rubric)
        found.append(rubric if isinstance(rubric, Rubric) else Rubric.model_validate(dict(rubric)))
    names = [rubric.name for rubric in found]
    if len(set(names)) < len(names):
        raise ValueError(f"rubrics with the same name: {', '.join(names)}; rename one")
    return found


def _published_rubrics() -> dict[str, Rubric]:
    """The rubrics of the shipped DMAPO configuration."""
    import importlib.resources

    text = (importlib.resources.files("configs") / "dmapo.yaml").read_text("utf-8")
    return {r["name"]: Rubric.model_validate(r) for r in yaml.safe_load(text)["judge"]["rubrics"]}

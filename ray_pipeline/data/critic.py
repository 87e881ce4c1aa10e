"""Critic: one process critique a candidate, which says whether the way to the answer is flawed and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import Asking, Critique, SamplingSettings, critique
from ray_pipeline.agents.templates import Layout, RoleTemplate
from ray_pipeline.data.judging import answers_of, unanswered
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage
from ray_pipeline.store.schemas import CRITIQUES, READ_STATUSES, to_table
from ray_pipeline.store.settings import Settings


class CriticSettings(Settings):
    """The `critic` block."""

    model: str = Field("judge", description="a key of `models`")
    layout: Layout = Field("rubric_first", description="one call a candidate: only its own texts can be shared")
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: Asking = Asking()

    @model_validator(mode="after")
    def _no_score(self) -> CriticSettings:
        if self.asking.expected_score:
            raise ValueError("critic.asking.expected_score is read by nothing: a critic gives no score; remove it")
        return self


class _Given(Settings):
    template: RoleTemplate
    layout: Layout
    sampling: SamplingSettings
    asking: Asking


def critic(
    settings: CriticSettings,
    failure: FailureSettings,
    model: ModelSettings,
    template: RoleTemplate,
    prompts: Stage,
    candidates: Stage,
) -> Stage:
    """One critique a candidate."""
    given = _Given(template=template, layout=settings.layout, sampling=settings.sampling, asking=settings.asking)
    inputs = {"prompts": prompts, "candidates": candidates}
    return llm_stage("critic", critique_shard, ("critiques",), given, model, failure, inputs)


async def critique_shard(given: ShardInput) -> ShardOutput:
    """The critiques of one shard, ordered by candidate."""
    messages = {row["prompt_id"]: row["messages"] for row in given.tables["prompts"].to_pylist()}
    answers = answers_of(given.tables["candidates"].to_pylist())
    rows = await all_of(_critique_one(given, answer, messages[answer["prompt_id"]]) for answer in answers)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["parse_status"]] = counts.get(row["parse_status"], 0) + 1
    return ShardOutput({"critiques": to_table(rows, CRITIQUES)}, counts)


async def _critique_one(given: ShardInput, answer: Mapping[str, Any], messages: list[dict[str, str]]) -> dict[str, Any]:
    assert given.engine is not None
    settings: _Given = given.settings
    status = unanswered(answer)
    if status is not None:
        found = Critique(None, None, None, status, None)
    else:
        engine = given.engine.bound(answer["prompt_id"], "critic")
        found = await critique(
            engine, messages, answer["response"], settings.template, settings.sampling, settings.asking, settings.layout
        )
        if found.parse_status != "too_long":
            given.watch("the critic", found.parse_status in READ_STATUSES)
    given.tick(1)
    return {
        "candidate_id": answer["id"],
        "prompt_id": answer["prompt_id"],
        "flawed": found.flawed,
        "failure_type": found.failure_type,
        "reason": found.reason,
        "parse_status": found.parse_status,
        "raw": found.raw,
    }

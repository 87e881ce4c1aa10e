"""Candidates: k answers of the policy to every prompt, each drawn with a seed of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.engines.base import EngineError, PromptTooLong
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage
from ray_pipeline.store.keys import candidate_id, derived_seed
from ray_pipeline.store.schemas import CANDIDATES, to_table
from ray_pipeline.store.settings import Settings

_PUBLISHED = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=512)


class CandidateSettings(Settings):
    """The `candidates` block."""

    model: str = Field("policy", description="a key of `models`")
    k: int = Field(4, ge=1, le=1024)
    seed: int = 0
    sampling: SamplingSettings = _PUBLISHED

    @field_validator("sampling", mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        """A block that sets one key keeps the published others; at temperature 0 all k answers would be the same."""
        return {**_PUBLISHED.model_dump(), **given} if isinstance(given, Mapping) else given


def candidates(settings: CandidateSettings, failure: FailureSettings, model: ModelSettings, prompts: Stage) -> Stage:
    """k rows a prompt. A prompt that does not fit the model's context gives rows that say so."""
    return llm_stage("candidates", draw, ("candidates",), settings, model, failure, {"prompts": prompts})


async def draw(given: ShardInput) -> ShardOutput:
    """The candidates of one shard, ordered by prompt and k."""
    settings: CandidateSettings = given.settings
    prompts = given.tables["prompts"].to_pylist()
    rows = await all_of(_draw_one(given, settings, prompt, k) for prompt in prompts for k in range(settings.k))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["finish_reason"]] = counts.get(row["finish_reason"], 0) + 1
    return ShardOutput({"candidates": to_table(rows, CANDIDATES)}, counts)


async def _draw_one(given: ShardInput, settings: CandidateSettings, prompt: Mapping[str, Any], k: int) -> dict:
    assert given.engine is not None
    pid = prompt["prompt_id"]
    seed = derived_seed("candidate", settings.seed, pid, k)
    sampling = settings.sampling.sampling(seed=seed)
    identity = given.engine.identity
    cid = candidate_id(pid, identity, sampling.key(), k)
    row: dict[str, Any] = {
        "candidate_id": cid,
        "prompt_id": pid,
        "k": k,
        "seed": seed,
        "response": None,
        "generator": identity["model"],
        "prompt_tokens": None,
        "completion_tokens": None,
    }
    try:
        reply = await given.engine.bound(pid, "candidate").chat(prompt["messages"], sampling)
    except PromptTooLong as error:
        row |= {"finish_reason": "too_long", "prompt_tokens": error.prompt_tokens}
    except EngineError:
        row |= {"finish_reason": "error"}
    else:
        row |= {
            "response": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
    given.watch("the generator", row["finish_reason"] != "error")
    given.tick(1)
    return row

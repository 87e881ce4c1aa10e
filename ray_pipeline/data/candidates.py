"""Candidates: k answers of the policy to every prompt, each sampled with its own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.config.settings import Settings, over
from ray_pipeline.engines.base import ChatEngine, EngineError, Message, PromptTooLong, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.keys import candidate_id, derived_seed
from ray_pipeline.store.outside import token_count
from ray_pipeline.store.schemas import CANDIDATES

_PUBLISHED = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=512)


class CandidateSettings(Settings):
    """The `candidates` block: how the policy answers each prompt."""

    model: str = Field("policy", description="a key of `models`")
    k: int = Field(4, ge=1, le=1024, description="candidates for each prompt")
    seed: int = Field(0, description="seed of all sampling in this block")
    sampling: Annotated[SamplingSettings, over(_PUBLISHED)] = _PUBLISHED


class _Draw(NamedTuple):
    prompt_id: str
    messages: list[Message]
    k: int


def _draws(shard: ShardTables, settings: CandidateSettings) -> list[_Draw]:
    return [_Draw(row["prompt_id"], row["messages"], k) for row in shard.rows("prompts") for k in range(settings.k)]


async def _draw(engine: ChatEngine, settings: CandidateSettings, item: _Draw) -> Outcome:
    seed = derived_seed("candidate", settings.seed, item.prompt_id, item.k)
    sampling = settings.sampling.sampling(seed=seed)
    row = await candidate_row(engine, item.prompt_id, item.messages, sampling, sampling.key(), item.k)
    return Outcome({"candidates": [row]}, generated("the generator", row))


async def candidate_row(
    engine: ChatEngine, prompt: str, messages: Sequence[Message], sampling: Sampling, key: Mapping[str, Any], k: int
) -> Row:
    """One answer to `messages` as a row of schema CANDIDATES.

    Args:
        key: what the candidate's id is made of, beside prompt, generator and k.
    """
    return {
        "candidate_id": candidate_id(prompt, engine.identity, key, k),
        "prompt_id": prompt,
        "k": k,
        "seed": sampling.seed,
        "generator": engine.identity["model"],
        **await reply_columns(engine, messages, sampling),
    }


async def reply_columns(engine: ChatEngine, messages: Sequence[Message], sampling: Sampling) -> Row:
    """One answer as columns response, finish_reason, prompt_tokens, completion_tokens and error. A failed call
    gives finish_reason too_long or error, no response, and the reason as error."""
    try:
        reply = await engine.chat(messages, sampling)
    except PromptTooLong as error:
        tokens = token_count(error.prompt_tokens)
        return {"response": None, "finish_reason": "too_long", "prompt_tokens": tokens, "error": str(error)}
    except EngineError as error:
        return {"response": None, "finish_reason": "error", "error": f"{type(error).__name__}: {error}"}
    return {
        "response": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "error": None,
    }


def generated(name: str, row: Row) -> list[tuple[str, bool]]:
    """`Outcome.replies` of an answer: only a failed call counts as unread, not a prompt that is too long."""
    return [(name, row["finish_reason"] != "error")]


DRAW = Asking(
    tables={"candidates": CANDIDATES},
    items=_draws,
    ask=_draw,
    role="candidate",
    counts=count_by("candidates", "finish_reason"),
)


def candidates(settings: CandidateSettings, model: ModelSettings, prompts: Stage) -> Stage:
    """k rows per prompt, ordered by prompt and k. A prompt that exceeds the context has finish_reason too_long."""
    return DRAW.stage("candidates", settings, model, {"prompts": prompts})

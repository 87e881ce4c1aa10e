"""Candidates: k answers to every prompt, each sampled with its own seed, from one model or several; or answers that the
user has already (`own_candidates.py`)."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings, over, refuse_repeated, repeated
from ray_pipeline.data.candidate_sources import CandidateSource
from ray_pipeline.data.decontamination import Decontaminate
from ray_pipeline.data.own_candidates import own_candidates
from ray_pipeline.engines.base import ChatEngine, EngineError, Message, PromptTooLong, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.engines.thoughts import answered
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import candidate_id, canonical_json, derived_seed
from ray_pipeline.store.outside import token_count
from ray_pipeline.store.schemas import CANDIDATES, to_table

_PUBLISHED = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=512)


class CandidateSettings(Settings):
    """The `candidates` block: how each prompt is answered, or where the answers are."""

    model: str = Field("policy", description="a key of `models`")
    generators: tuple[str, ...] | dict[str, Annotated[int, Field(ge=1, le=1024)]] | None = Field(
        None,
        description="several models, instead of `model`: keys of `models`, each of which gives k candidates to each "
        "prompt; or key → number of candidates that it gives, instead of `k`",
    )
    k: int = Field(4, ge=1, le=1024, description="candidates for each prompt")
    seed: int = Field(0, description="seed of all sampling in this block")
    sampling: Annotated[SamplingSettings, over(_PUBLISHED)] = _PUBLISHED
    source: CandidateSource | None = Field(
        None,
        description="completions that exist already, instead of generation; their rows hold the prompts too, so that "
        "`prompts.sources` is not set",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.source is not None and (keys := sorted(self.model_fields_set - {"source"})):
            raise ValueError(f"{keys[0]} has no effect on the completions of a source; remove it")
        if self.generators is None:
            return self
        if not self.generators:
            raise ValueError("generators is empty; name at least one model")
        refuse_repeated(list(self.generators), "generators")
        if "model" in self.model_fields_set:
            raise ValueError("set model or generators, not both")
        if isinstance(self.generators, dict) and "k" in self.model_fields_set:
            raise ValueError("k has no effect where generators gives the number of each; remove it")
        return self

    @property
    def drawn(self) -> dict[str, int]:
        """Model → candidates that it gives to each prompt; empty with a source."""
        if self.source is not None:
            return {}
        if isinstance(self.generators, dict):
            return self.generators
        return dict.fromkeys(self.generators or (self.model,), self.k)

    def of(self, model: str) -> CandidateSettings:
        """The settings of one of several generators."""
        shared = self.model_dump(exclude={"generators", "model", "k", "source"}, exclude_unset=True)
        return CandidateSettings(**shared, model=model, k=self.drawn[model])


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
    return Outcome({"candidates": [{**row, "model": settings.model}]}, generated("the generator", row))


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
    """One answer as columns response, finish_reason, prompt_tokens, completion_tokens, error and thoughts. A failed
    call gives finish_reason too_long or error, no response, and the reason as error; a thought without an answer gives
    no response."""
    try:
        reply = answered(await engine.chat(messages, sampling))
    except PromptTooLong as error:
        tokens = token_count(error.prompt_tokens)
        return {"response": None, "finish_reason": "too_long", "prompt_tokens": tokens, "error": str(error)}
    except EngineError as error:
        return {"response": None, "finish_reason": "error", "error": f"{type(error).__name__}: {error}"}
    return {
        "response": None if reply.thoughts and not reply.text.strip() else reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "error": None,
        "thoughts": reply.thoughts,
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


def candidates(
    settings: CandidateSettings,
    models: Mapping[str, ModelSettings],
    prompts: Stage,
    decontaminate: Decontaminate | None = None,
) -> Stage:
    """The candidates of every prompt, ordered by prompt and k: drawn from one model or several, or the user's own.

    A prompt that exceeds the context has finish_reason too_long.

    Args:
        decontaminate: of the prompts, for the user's own answers.
    """
    if settings.source is not None:
        return own_candidates(settings.source, prompts, decontaminate)
    if settings.generators is None:
        return drawn(settings, models[settings.model], prompts)
    same = repeated(canonical_json([models[model].weights(), models[model].semantics()]) for model in settings.drawn)
    if same:
        raise ConfigError(
            f"candidates.generators: {len(settings.drawn)} models, two of which are the same, so that their candidates "
            "would be the same too; raise k of one instead"
        )
    of_model = {
        model: DRAW.stage(
            f"candidates-{model}",
            settings.of(model),
            models[model],
            {"prompts": prompts},
            group="candidates",
            holds="drawn candidates",
        )
        for model in settings.drawn
    }
    return Stage(
        name="candidates",
        work=ShardWork(function=put_together, tables=("candidates",)),
        config=None,
        inputs={f"drawn/{number:02d}/{model}": stage for number, (model, stage) in enumerate(of_model.items())},
    )


def drawn(
    settings: CandidateSettings,
    model: ModelSettings,
    prompts: Stage,
    name: str = "candidates",
    train: Stage | None = None,
) -> Stage:
    """The candidates of one model.

    Args:
        train: the stage that makes the model's weights, if a stage does.
    """
    return DRAW.stage(name, settings, model, {"prompts": prompts}, train=train)


def put_together(given: ShardInput) -> ShardOutput:
    """The rows of all generators by prompt, taking turns, with new numbers k; the first k are of different models."""
    tables = ShardTables(given.tables, given.facts).under("drawn/")
    rows = [(row["prompt_id"], row["k"], turn, row) for turn, table in enumerate(tables) for row in table.to_pylist()]
    numbers = collections.Counter[str]()
    ordered = []
    for name, _, _, row in sorted(rows, key=lambda one: one[:3]):
        ordered.append({**row, "k": numbers[name]})
        numbers[name] += 1
    given.tick(len(ordered))
    return ShardOutput(
        {"candidates": to_table(ordered, CANDIDATES)}, collections.Counter(row["finish_reason"] for row in ordered)
    )

"""Responses and comparisons: base and policies answer the same held-out prompts, and a judge compares each policy with
the base, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import Asking, Choice, SamplingSettings, compare
from ray_pipeline.agents.templates import Layout, RoleTemplate
from ray_pipeline.data.judging import unanswered
from ray_pipeline.engines.base import EngineError, PromptTooLong
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage
from ray_pipeline.stats.protocol import Protocol, settings_text, win_rate_by
from ray_pipeline.store.keys import derived_seed, digest
from ray_pipeline.store.schemas import COMPARISONS, READ_STATUSES, RESPONSES, to_table
from ray_pipeline.store.settings import Settings

#: What a choice means for the policy; in order `ab` the policy's answer is A, in order `ba` the base model's is.
_VOTES = {("ab", "A"): "policy", ("ab", "B"): "base", ("ba", "A"): "base", ("ba", "B"): "policy"}


class Mode(Settings):
    """One way of drawing the responses that are evaluated."""

    name: str
    sampling: SamplingSettings


class EvaluateSettings(Settings):
    """The `evaluate` block."""

    modes: tuple[Mode, ...] = (
        Mode(name="greedy", sampling=SamplingSettings(temperature=0.0, max_tokens=512)),
        Mode(name="sampled", sampling=SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=512)),
    )
    seed: int = 0
    judge: str = Field("judge", description="the key of `models` that compares")
    layout: Layout = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: Asking = Asking()
    bootstrap_draws: int = Field(2000, ge=100)
    skip_generation: bool = Field(False, description="report what the stored tables hold; no responses, no comparisons")
    perplexity: bool = True
    perplexity_rows: int = Field(512, ge=1, description="at most so many held-out desirable rows, by smallest id")

    @model_validator(mode="after")
    def _modes(self) -> EvaluateSettings:
        names = [m.name for m in self.modes]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"evaluate.modes needs distinct names and at least one, not {names}")
        if self.asking.expected_score:
            raise ValueError(
                "evaluate.asking.expected_score is read by nothing: a comparison gives no score; remove it"
            )
        return self


class _Draw(Settings):
    label: str
    modes: tuple[Mode, ...]
    seed: int


def responses(
    label: str,
    settings: EvaluateSettings,
    failure: FailureSettings,
    model: ModelSettings,
    prompts: Stage,
    train: Stage | None = None,
) -> Stage:
    """Answers of one model to the held-out prompts, one row a mode.

    Args:
        label: name of the model in the tables; "base" is the one that policies are compared with.
        train: the stage that makes the model's weights. They need not be there yet: its fingerprint stands for them.
    """
    given = _Draw(label=label, modes=settings.modes, seed=settings.seed)
    return llm_stage(
        f"responses-{label}",
        respond,
        ("responses",),
        given,
        model,
        failure,
        {"prompts": prompts},
        group="evaluate",
        train=train,
    )


async def respond(given: ShardInput) -> ShardOutput:
    """The responses of one shard's held-out prompts, ordered by prompt and mode."""
    settings: _Draw = given.settings
    prompts = [row for row in given.tables["prompts"].to_pylist() if row["split"] == "val"]
    rows = await all_of(_respond_one(given, settings, prompt, mode) for prompt in prompts for mode in settings.modes)
    return ShardOutput({"responses": to_table(rows, RESPONSES)})


async def _respond_one(given: ShardInput, settings: _Draw, prompt: Mapping[str, Any], mode: Mode) -> dict[str, Any]:
    assert given.engine is not None
    pid = prompt["prompt_id"]
    # Both models draw with the same seed; a greedy draw has none to use.
    seed = derived_seed("evaluate", settings.seed, pid, mode.name) if mode.sampling.temperature > 0 else None
    sampling = mode.sampling.sampling(seed=seed)
    row: dict[str, Any] = {
        "response_id": digest(["response", pid, dict(given.engine.identity), sampling.key(), mode.name]),
        "prompt_id": pid,
        "model": settings.label,
        "mode": mode.name,
        "response": None,
        "prompt_tokens": None,
        "completion_tokens": None,
    }
    try:
        reply = await given.engine.bound(pid, f"evaluate/{settings.label}").chat(prompt["messages"], sampling)
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
    given.watch(f"the {settings.label} model", row["finish_reason"] != "error")
    given.tick(1)
    return row


class _Compare(Settings):
    policies: tuple[str, ...]
    judge: str
    mode: str
    template: RoleTemplate
    layout: Layout
    sampling: SamplingSettings
    asking: Asking


def comparisons(
    settings: EvaluateSettings,
    failure: FailureSettings,
    model: ModelSettings,
    template: RoleTemplate,
    prompts: Stage,
    base: Stage,
    policies: Mapping[str, Stage],
) -> Stage:
    """Each policy against the base in the first mode, in both orders.

    Args:
        policies: label → stage of its responses.
    """
    given = _Compare(
        policies=tuple(policies),
        judge=settings.judge,
        mode=settings.modes[0].name,
        template=template,
        layout=settings.layout,
        sampling=settings.sampling,
        asking=settings.asking,
    )
    inputs = {"prompts": prompts, "base": base, **policies}
    return llm_stage("comparisons", compare_shard, ("comparisons",), given, model, failure, inputs, group="evaluate")


def win_rate_protocol(stages: Iterable[Stage]) -> dict[str, Protocol]:
    """Judge → what is known of the protocol of its win rates before anything is asked; empty without comparisons.

    Prompts and reference answers come with the tables (`evaluation.winrate.completed_protocol`).
    """
    found = {}
    for stage in stages:
        settings = stage.work.settings
        if not isinstance(settings, _Compare):
            continue
        drawn: _Draw = stage.inputs["base"].work.settings
        mode = next(mode for mode in drawn.modes if mode.name == settings.mode)
        found[settings.judge] = win_rate_by(
            stage.external,
            stage.config["engine"],
            {**settings.sampling.model_dump(), **settings.asking.model_dump()},
            judge_prompts=digest([settings.template.model_dump(mode="json"), settings.layout]),
            reading="forced form" if settings.asking.grammar else "anchored text",
            order="both orders, a win or loss needs both",
            reference="base",
            answers=settings_text(mode=mode.name, seed=drawn.seed, **mode.sampling.model_dump()),
        )
    return found


async def compare_shard(given: ShardInput) -> ShardOutput:
    """The comparisons of one shard, ordered by prompt, policy and order; joined by prompt and mode."""
    settings: _Compare = given.settings
    answers = {
        role: {r["prompt_id"]: r for r in given.tables[role].to_pylist() if r["mode"] == settings.mode}
        for role in ("base", *settings.policies)
    }
    prompts = [row for row in given.tables["prompts"].to_pylist() if row["prompt_id"] in answers["base"]]
    rows = await all_of(
        _compare_one(
            given, settings, prompt, answers["base"][prompt["prompt_id"]], answers[policy][prompt["prompt_id"]], order
        )
        for prompt in prompts
        for policy in settings.policies
        for order in ("ab", "ba")
    )
    return ShardOutput({"comparisons": to_table(rows, COMPARISONS)})


async def _compare_one(
    given: ShardInput,
    settings: _Compare,
    prompt: Mapping[str, Any],
    base: Mapping[str, Any],
    policy: Mapping[str, Any],
    order: str,
) -> dict[str, Any]:
    assert given.engine is not None
    first, second = (policy, base) if order == "ab" else (base, policy)
    missing = {unanswered(first), unanswered(second)} - {None}
    if missing:
        found = Choice(None, None, "too_long" if "too_long" in missing else "error", None)
    else:
        found = await compare(
            given.engine.bound(prompt["prompt_id"], "compare"),
            prompt["messages"],
            first["response"],
            second["response"],
            settings.template,
            settings.sampling,
            settings.asking,
            settings.layout,
        )
        if found.parse_status != "too_long":
            given.watch("the comparing judge", found.parse_status in READ_STATUSES)
    given.tick(1)
    vote = None if found.choice is None else _VOTES.get((order, found.choice), "tie")
    return {
        "pair_id": digest(["pair", policy["response_id"], base["response_id"]]),
        "prompt_id": prompt["prompt_id"],
        "judge": settings.judge,
        "order": order,
        "model_a": first["model"],
        "model_b": second["model"],
        "choice": found.choice,
        "vote": vote,
        "reason": found.reason,
        "parse_status": found.parse_status,
        "raw": found.raw,
    }

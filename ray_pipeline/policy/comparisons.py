"""Responses and comparisons: base and policies answer the same held-out prompts, and a judge compares each policy with
the base in both orders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import JudgeAsking, SamplingSettings, columns_of, compare
from ray_pipeline.agents.templates import Layout, LayoutKey, RoleTemplate
from ray_pipeline.config.settings import Name, Settings
from ray_pipeline.data.answers import unanswered
from ray_pipeline.data.candidates import generated, reply_columns
from ray_pipeline.data.checkers import CheckerKey
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, reply_status
from ray_pipeline.graph.stage import Stage
from ray_pipeline.stats.protocol import Protocol, settings_text, win_rate_by
from ray_pipeline.stats.winrate import choice_to_vote
from ray_pipeline.store.keys import derived_seed, digest
from ray_pipeline.store.schemas import COMPARISONS, RESPONSES


class Mode(Settings):
    """One way of sampling the responses that are evaluated."""

    name: Name = Field(description="name of the mode in the tables")
    sampling: SamplingSettings


class EvaluateSettings(Settings):
    """The `evaluate` block: how the policy is measured against its base."""

    modes: tuple[Mode, ...] = Field(
        (
            Mode(name="greedy", sampling=SamplingSettings(temperature=0.0, max_tokens=512)),
            Mode(name="sampled", sampling=SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=512)),
        ),
        description="ways in which base and policy answer the held-out prompts",
    )
    seed: int = Field(0, description="seed of responses and bootstrap")
    judge: str = Field("judge", description="a key of `models`: the judge that compares")
    layout: LayoutKey = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=512)
    asking: JudgeAsking = JudgeAsking()
    bootstrap_draws: int = Field(2000, ge=100, description="bootstrap samples of the intervals")
    skip_generation: bool = Field(False, description="only report stored tables; make no responses and no comparisons")
    checker: CheckerKey = None
    perplexity: bool = Field(True, description="measure perplexities of base and policy on held-out desirable rows")
    perplexity_rows: int = Field(512, ge=1, description="maximum number of held-out desirable rows (smallest ids kept)")

    @model_validator(mode="after")
    def _modes(self) -> EvaluateSettings:
        names = [m.name for m in self.modes]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"evaluate.modes needs distinct names and at least one, not {names}")
        if self.asking.expected_score:
            raise ValueError("evaluate.asking.expected_score has no effect: a comparison gives no score; remove it")
        return self


class _Respond(Settings):
    label: str
    modes: tuple[Mode, ...]
    seed: int


class _Draw(NamedTuple):
    prompt_id: str
    messages: list[Message]
    mode: Mode


def _draws(shard: ShardTables, settings: _Respond) -> list[_Draw]:
    held_out = [row for row in shard.rows("prompts") if row["split"] == "val"]
    return [_Draw(row["prompt_id"], row["messages"], mode) for row in held_out for mode in settings.modes]


async def _respond(engine: ChatEngine, settings: _Respond, item: _Draw) -> Outcome:
    mode, prompt = item.mode, item.prompt_id
    # Both models draw with the same seed; a greedy draw has none to use.
    seed = derived_seed("evaluate", settings.seed, prompt, mode.name) if mode.sampling.temperature > 0 else None
    sampling = mode.sampling.sampling(seed=seed)
    row = {
        "response_id": digest(["response", prompt, dict(engine.identity), sampling.key(), mode.name]),
        "prompt_id": prompt,
        "model": settings.label,
        "mode": mode.name,
        **await reply_columns(engine, item.messages, sampling),
    }
    return Outcome({"responses": [row]}, generated(f"the {settings.label} model", row))


RESPOND = Asking(
    tables={"responses": RESPONSES},
    items=_draws,
    ask=_respond,
    role=lambda settings, item: f"evaluate/{settings.label}",
)


def responses(
    label: str, settings: EvaluateSettings, model: ModelSettings, prompts: Stage, train: Stage | None = None
) -> Stage:
    """Answers of one model to the held-out prompts, one row per mode, ordered by prompt and mode.

    Args:
        label: name of the model in the tables; policies are compared with "base".
        train: the stage that makes the model's weights. They need not exist yet: its fingerprint stands for them.
    """
    given = _Respond.part_of(settings, label=label)
    return RESPOND.stage(f"responses-{label}", given, model, {"prompts": prompts}, group="evaluate", train=train)


class _Compare(Settings):
    policies: tuple[str, ...]
    judge: str
    mode: str
    template: RoleTemplate
    layout: Layout
    sampling: SamplingSettings
    asking: JudgeAsking


class _Pair(NamedTuple):
    prompt_id: str
    messages: list[Message]
    base: Row
    policy: Row
    order: str


def _pairs(shard: ShardTables, settings: _Compare) -> Iterator[_Pair]:
    """Responses of one mode, joined by prompt; each pair in both orders."""
    answers = {
        role: {row["prompt_id"]: row for row in shard.rows(role) if row["mode"] == settings.mode}
        for role in ("base", *settings.policies)
    }
    for prompt in shard.rows("prompts"):
        key = prompt["prompt_id"]
        if key in answers["base"]:
            for policy in settings.policies:
                for order in ("ab", "ba"):
                    yield _Pair(key, prompt["messages"], answers["base"][key], answers[policy][key], order)


def pair_id(policy: str, base: str) -> str:
    """Id of a pair of responses, by theirs."""
    return digest(["pair", policy, base])


async def _compare(engine: ChatEngine, settings: _Compare, pair: _Pair) -> Outcome:
    first, second = (pair.policy, pair.base) if pair.order == "ab" else (pair.base, pair.policy)
    row = {
        "pair_id": pair_id(pair.policy["response_id"], pair.base["response_id"]),
        "prompt_id": pair.prompt_id,
        "judge": settings.judge,
        "order": pair.order,
        "model_a": first["model"],
        "model_b": second["model"],
    }
    if missing := {unanswered(first), unanswered(second)} - {None}:
        return Outcome({"comparisons": [{**row, "parse_status": "too_long" if "too_long" in missing else "error"}]})
    choice = await compare(
        engine,
        pair.messages,
        first["response"],
        second["response"],
        settings.template,
        settings.sampling,
        settings.asking,
        settings.layout,
    )
    vote = None if choice.choice is None else choice_to_vote(choice.choice, pair.order)
    return Outcome(
        {"comparisons": [{**row, **columns_of(choice), "vote": vote}]},
        reply_status("the comparing judge", choice.parse_status),
    )


COMPARE = Asking(tables={"comparisons": COMPARISONS}, items=_pairs, ask=_compare, role="compare")


def comparisons(
    settings: EvaluateSettings,
    model: ModelSettings,
    template: RoleTemplate,
    prompts: Stage,
    base: Stage,
    policies: Mapping[str, Stage],
    name: str = "comparisons",
) -> Stage:
    """Each policy against the base in the first mode, in both orders; ordered by prompt, policy and order.

    Args:
        policies: stages of responses by label.
    """
    given = _Compare.part_of(settings, policies=tuple(policies), mode=settings.modes[0].name, template=template)
    return COMPARE.stage(name, given, model, {"prompts": prompts, "base": base, **policies}, group="evaluate")


def win_rate_protocol(stages: Iterable[Stage]) -> dict[str, Protocol]:
    """By judge, what is known of the protocol of its win rates before any call; empty without comparisons.

    Prompts and reference answers come with the tables (`evaluation.winrate.completed_protocol`).
    """
    found = {}
    for stage in stages:
        settings = stage.work.settings
        if not isinstance(settings, _Compare):
            continue
        drawn: _Respond = stage.inputs["base"].work.settings
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

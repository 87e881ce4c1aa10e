"""Judges asked live: every strategy of every judge on every item, and debates, as sharded stages with the call log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from ray_pipeline.agents.debate import Debated, DebateSettings, DebateTemplates, debate
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import (
    Look,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    decide,
    vote,
)
from ray_pipeline.agents.templates import Layout
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage
from ray_pipeline.store.schemas import BALLOTS, SPEECHES, to_table
from ray_pipeline.store.settings import Settings


class LiveJudge(Settings):
    """One judge that is asked: its name in the tables and the model that it is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: str = Field("judge", description="a key of `models`")
    sampling: SamplingSettings | None = Field(None, description="default: the block's")
    rubric: str | None = Field(None, description="what it looks at; default: the strategy's")


class AskSettings(Settings):
    """The `ask` block: who is asked, and how. Without judges and debaters nothing is asked."""

    judges: tuple[LiveJudge, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    debaters: tuple[LiveJudge, ...] = Field((), description="each debates all roles with itself")
    debate: DebateSettings = DebateSettings()
    strategy_templates: str = Field("default", description="built-in name or YAML file of what judges are asked")
    debate_templates: str = Field("default", description="built-in name or YAML file of the debate's roles and texts")
    layout: Layout = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @field_validator("strategies", "debate")
    @classmethod
    def _measured_later(cls, given: Any) -> Any:
        """What is asked is stored order by order and voice by voice; what it comes to is the measure's business."""
        for one in given if isinstance(given, tuple) else (given,):
            where = "debate" if isinstance(one, DebateSettings) else f"strategy {one.name}"
            if "conflict" in one.model_fields_set:
                raise ValueError(f"{where}: conflict is not read here; set measure.conflict, which holds for all")
            if "pool" in one.model_fields_set:
                raise ValueError(f"{where}: pool is not read here; set measure.debate (mean or vote)")
        return given

    @field_serializer("strategies")
    def _strategies_as_asked(self, strategies: tuple[Strategy, ...]) -> list[dict[str, Any]]:
        """Without what is refused, so that a run's config.yaml can be given again."""
        return [s.model_dump(mode="json", exclude={"conflict"}) for s in strategies]

    @field_serializer("debate")
    def _debate_as_asked(self, rules: DebateSettings) -> dict[str, Any]:
        return rules.model_dump(mode="json", exclude={"conflict", "pool"})

    @field_validator("strategies")
    @classmethod
    def _distinct_strategies(cls, strategies: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        names = [s.name for s in strategies]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two strategies are called {', '.join(twice)}; give one of them another name")
        if reserved := sorted({"debate", "versus"} & set(names)):
            raise ValueError(f"{reserved[0]} is a name of its own; give the strategy another one")
        return strategies

    @model_validator(mode="after")
    def _consistent(self) -> AskSettings:
        for block, judges in (("judges", self.judges), ("debaters", self.debaters)):
            names = [j.name for j in judges]
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"two of {block} have the same name: {', '.join(twice)}")
        if self.judges and not self.strategies:
            raise ValueError("judges are asked by strategies, and there is none; name at least one")
        if self.strategies and not self.judges:
            raise ValueError("strategies are read by judges only, and there is none; name judges or remove them")
        if any(d.rubric is not None for d in self.debaters):
            raise ValueError("a debater has no rubric; its roles and tasks are in debate_templates")
        return self

    @property
    def models(self) -> list[str]:
        """Keys of the models that are asked."""
        return list(dict.fromkeys(j.model for j in (*self.judges, *self.debaters)))


class _JudgesGiven(Settings):
    judges: tuple[LiveJudge, ...]
    strategies: tuple[Strategy, ...]
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking


class _DebatersGiven(Settings):
    debaters: tuple[LiveJudge, ...]
    rules: DebateSettings
    templates: DebateTemplates
    sampling: SamplingSettings
    asking: StrategyAsking


def ask_stages(
    settings: AskSettings,
    strategies: StrategyTemplates,
    debates: DebateTemplates,
    failure: FailureSettings,
    models: Mapping[str, ModelSettings],
    items: Stage,
) -> list[Stage]:
    """One stage a model and kind: verdicts of models are their own stages and are joined by key."""
    stages = []
    for key in settings.models:
        judges = tuple(j for j in settings.judges if j.model == key)
        debaters = tuple(d for d in settings.debaters if d.model == key)
        if judges:
            given: Settings = _JudgesGiven(
                judges=judges,
                strategies=settings.strategies,
                templates=strategies,
                layout=settings.layout,
                sampling=settings.sampling,
                asking=settings.asking,
            )
            stages.append(
                llm_stage(
                    f"ask-{key}", ask_shard, ("ballots",), given, models[key], failure, {"items": items}, group="ask"
                )
            )
        if debaters:
            given = _DebatersGiven(
                debaters=debaters,
                rules=settings.debate,
                templates=debates,
                sampling=settings.sampling,
                asking=settings.asking,
            )
            name, tables = f"debate-{key}", ("ballots", "speeches")
            stages.append(
                llm_stage(name, debate_shard, tables, given, models[key], failure, {"items": items}, group="debate")
            )
    return stages


async def ask_shard(given: ShardInput) -> ShardOutput:
    """The ballots of one shard, ordered by item, strategy, judge and order."""
    settings: _JudgesGiven = given.settings
    groups = await all_of(
        _ask(given, settings, item, judge, strategy)
        for item in given.tables["items.items"].to_pylist()
        for strategy in settings.strategies
        for judge in settings.judges
    )
    return ShardOutput({"ballots": to_table(_flat(groups), BALLOTS)}, _counts(groups))


async def debate_shard(given: ShardInput) -> ShardOutput:
    """The final ballots of one shard's debates, by voice, and what was said."""
    settings: _DebatersGiven = given.settings
    held = await all_of(
        _debate(given, settings, item, debater)
        for item in given.tables["items.items"].to_pylist()
        for debater in settings.debaters
    )
    ballots = [ballots for ballots, _ in held]
    speeches = _flat([speeches for _, speeches in held])
    return ShardOutput(
        {"ballots": to_table(_flat(ballots), BALLOTS), "speeches": to_table(speeches, SPEECHES)}, _counts(ballots)
    )


def askable(item: Mapping[str, Any]) -> bool:
    """Whether an item has everything that a judge must see."""
    return all(item[field] is not None for field in ("question", "response_a", "response_b"))


async def _ask(
    given: ShardInput, settings: _JudgesGiven, item: Mapping[str, Any], judge: LiveJudge, strategy: Strategy
) -> list[dict[str, Any]]:
    assert given.engine is not None
    key = {"item_id": item["item_id"], "prompt_id": item["prompt_id"], "strategy": strategy.name, "judge": judge.name}
    given.tick(1)
    if not askable(item):
        return [{**key, "voice": "", **skipped_ballot()}]
    found = await decide(
        given.engine.bound(item["prompt_id"], f"ask/{strategy.name}"),
        [{"role": "user", "content": item["question"]}],
        (item["response_a"], item["response_b"]),
        strategy if judge.rubric is None else strategy.model_copy(update={"rubric": judge.rubric}),
        settings.templates,
        judge.sampling or settings.sampling,
        settings.asking,
        settings.layout,
    )
    if found.parse_status != "too_long":
        given.watch(f"judge {judge.name} ({strategy.name})", found.read)
    return [{**key, "voice": "", **ballot_of(look)} for look in found.looks]


async def _debate(
    given: ShardInput, settings: _DebatersGiven, item: Mapping[str, Any], debater: LiveJudge
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    assert given.engine is not None
    key = {"item_id": item["item_id"], "prompt_id": item["prompt_id"], "judge": debater.name}
    given.tick(1)
    if not askable(item):
        roles = [role.name for role in settings.templates.roles]
        return [{**key, "strategy": "debate", "voice": role, **skipped_ballot()} for role in roles], []
    found: Debated = await debate(
        given.engine.bound(item["prompt_id"], "debate"),
        [{"role": "user", "content": item["question"]}],
        (item["response_a"], item["response_b"]),
        settings.templates,
        settings.rules,
        debater.sampling or settings.sampling,
        settings.asking,
    )
    for judgement in found.voices.values():
        if judgement.parse_status != "too_long":
            given.watch(f"debater {debater.name}", judgement.read)
    ballots = [
        {**key, "strategy": "debate", "voice": role, **ballot_of(look)}
        for role, judgement in found.voices.items()
        for look in judgement.looks
    ]
    speeches = [
        {
            **key,
            "order": _order(s.order),
            "round": s.round,
            "position": s.position,
            "role": s.role,
            "text": s.text,
            "finish_reason": s.finish_reason,
        }
        for s in found.speeches
    ]
    return ballots, speeches


def ballot_of(look: Look) -> dict[str, Any]:
    """A look at two answers as columns of a ballot."""
    scores: Sequence[float | None] = look.scores or (None, None)
    return {
        "order": _order(look.order),
        "score_a": scores[0],
        "score_b": scores[1],
        "vote": vote(look.best),
        "reason": look.reason,
        "parse_status": look.parse_status,
        "raw": look.raw,
    }


def _order(order: tuple[int, ...]) -> str:
    return "ab" if order == (0, 1) else "ba"


def skipped_ballot(order: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Columns of a ballot for which nobody was asked: something that a judge must see is not there."""
    nothing = dict.fromkeys(("score_a", "score_b", "vote", "reason", "raw"))
    return {"order": _order(order), **nothing, "parse_status": "skipped"}


def _flat(groups: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for group in groups for row in group]


def _counts(groups: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for group in groups:
        for row in group:
            name = f"{row['strategy']}.{row['judge']}.{row['parse_status']}"
            counts[name] = counts.get(name, 0) + 1
    return counts

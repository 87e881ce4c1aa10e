"""Live judges: every strategy of every judge on every item, and debates, as sharded stages with a call log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field, field_serializer, field_validator, model_validator

from ray_pipeline.agents.debate import DebateSettings, DebateTemplates, debate
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import (
    Judgement,
    Look,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    decide,
    vote,
)
from ray_pipeline.agents.templates import Layout, LayoutKey
from ray_pipeline.config.settings import Name, Settings, refuse_repeated
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.schemas import BALLOTS, SPEECHES


class LiveJudge(Settings):
    """One judge: its name in the tables and its model."""

    name: Name = Field(description="name of the judge in the tables")
    model: str = Field("judge", description="a key of `models`")
    sampling: SamplingSettings | None = Field(None, description="default: `sampling` of the block")
    rubric: str | None = Field(None, description="aspect to judge; default: the strategy's")


class AskSettings(Settings):
    """The `ask` block: live judges and how they judge. Without judges and debaters no call is made."""

    judges: tuple[LiveJudge, ...] = Field((), description="models that judge by every strategy")
    strategies: tuple[Strategy, ...] = Field((), description="strategies of the judges")
    debaters: tuple[LiveJudge, ...] = Field((), description="judges that each play all roles of a debate")
    debate: DebateSettings = Field(DebateSettings(), description="rules of the debates")
    strategy_templates: str = Field("default", description="built-in name or YAML file of the judges' texts")
    debate_templates: str = Field("default", description="built-in name or YAML file of the debate's roles and texts")
    layout: LayoutKey = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @field_validator("strategies", "debate")
    @classmethod
    def _combined_later(cls, given: Any) -> Any:
        """Ballots are stored by order and voice; the `measure` block decides how they are combined."""
        for one in given if isinstance(given, tuple) else (given,):
            where = "debate" if isinstance(one, DebateSettings) else f"strategy {one.name}"
            if "conflict" in one.model_fields_set:
                raise ValueError(f"{where}: conflict has no effect here; set measure.conflict, which applies to all")
            if "pool" in one.model_fields_set:
                raise ValueError(f"{where}: pool has no effect here; set measure.debate (mean or vote)")
        return given

    @field_serializer("strategies")
    def _strategies_as_set(self, strategies: tuple[Strategy, ...]) -> list[dict[str, Any]]:
        """Without keys that are refused, so that a run's config.yaml can be loaded again."""
        return [s.model_dump(mode="json", exclude={"conflict"}) for s in strategies]

    @field_serializer("debate")
    def _debate_as_set(self, rules: DebateSettings) -> dict[str, Any]:
        return rules.model_dump(mode="json", exclude={"conflict", "pool"})

    @field_validator("strategies")
    @classmethod
    def _distinct_strategies(cls, strategies: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        names = [s.name for s in strategies]
        refuse_repeated(names, "strategies")
        if reserved := sorted({"debate", "versus"} & set(names)):
            raise ValueError(f"{reserved[0]} is a reserved name; rename the strategy")
        return strategies

    @model_validator(mode="after")
    def _consistent(self) -> AskSettings:
        for block, judges in (("judges", self.judges), ("debaters", self.debaters)):
            refuse_repeated((judge.name for judge in judges), block)
        if self.judges and not self.strategies:
            raise ValueError("judges have no effect without strategies; set at least one")
        if self.strategies and not self.judges:
            raise ValueError("strategies have no effect without judges; set judges or remove them")
        if any(d.rubric is not None for d in self.debaters):
            raise ValueError("a debater has no rubric; remove it and edit the roles in debate_templates")
        return self

    @property
    def models(self) -> list[str]:
        """Keys of the models that judge or debate."""
        return list(dict.fromkeys(j.model for j in (*self.judges, *self.debaters)))


class _Judges(Settings):
    judges: tuple[LiveJudge, ...]
    strategies: tuple[Strategy, ...]
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking


class _Debaters(Settings):
    debaters: tuple[LiveJudge, ...]
    rules: DebateSettings
    templates: DebateTemplates
    sampling: SamplingSettings
    asking: StrategyAsking


def ask_stages(
    settings: AskSettings,
    strategies: StrategyTemplates,
    debates: DebateTemplates,
    models: Mapping[str, ModelSettings],
    items: Stage,
) -> list[Stage]:
    """One stage per model and kind; ballots find their item by id, whichever stage wrote them."""
    stages = []
    for key in settings.models:
        judges = tuple(j for j in settings.judges if j.model == key)
        debaters = tuple(d for d in settings.debaters if d.model == key)
        if judges:
            asked = _Judges.part_of(settings, judges=judges, templates=strategies)
            stages.append(ASK.stage(f"ask-{key}", asked, models[key], {"items": items}, group="ask"))
        if debaters:
            held = _Debaters.part_of(settings, debaters=debaters, rules=settings.debate, templates=debates)
            stages.append(DEBATE.stage(f"debate-{key}", held, models[key], {"items": items}, group="debate"))
    return stages


class _Item(NamedTuple):
    """An item (a row of schema ITEMS), who judges it, and by which strategy."""

    prompt_id: str
    row: Row
    judge: LiveJudge
    strategy: Strategy


class _Debate(NamedTuple):
    prompt_id: str
    row: Row
    debater: LiveJudge


def _items(shard: ShardTables, settings: _Judges) -> list[_Item]:
    return [
        _Item(row["prompt_id"], row, judge, strategy)
        for row in shard.rows("items.items")
        for strategy in settings.strategies
        for judge in settings.judges
    ]


def _debates(shard: ShardTables, settings: _Debaters) -> list[_Debate]:
    return [
        _Debate(row["prompt_id"], row, debater) for row in shard.rows("items.items") for debater in settings.debaters
    ]


def _ids(row: Row, strategy: str, judge: str) -> Row:
    return {"item_id": row["item_id"], "prompt_id": row["prompt_id"], "strategy": strategy, "judge": judge}


def _complete(row: Row) -> bool:
    """Whether an item has everything that a judge must see."""
    return all(row[field] is not None for field in ("question", "response_a", "response_b"))


async def _ask(engine: ChatEngine, settings: _Judges, item: _Item) -> Outcome:
    row, judge, strategy = item.row, item.judge, item.strategy
    ids = {**_ids(row, strategy.name, judge.name), "voice": ""}
    if not _complete(row):
        return Outcome({"ballots": [{**ids, **skipped_ballot()}]})
    judgement = await decide(
        engine,
        [{"role": "user", "content": row["question"]}],
        (row["response_a"], row["response_b"]),
        strategy if judge.rubric is None else strategy.model_copy(update={"rubric": judge.rubric}),
        settings.templates,
        judge.sampling or settings.sampling,
        settings.asking,
        settings.layout,
    )
    ballots = [{**ids, **ballot_of(look)} for look in judgement.looks]
    return Outcome({"ballots": ballots}, judged(f"judge {judge.name} ({strategy.name})", judgement))


async def _debate(engine: ChatEngine, settings: _Debaters, item: _Debate) -> Outcome:
    """The final ballots of a debate, by voice, and its speeches."""
    row, debater = item.row, item.debater
    ids = _ids(row, "debate", debater.name)
    if not _complete(row):
        voices = [role.name for role in settings.templates.roles]
        return Outcome({"ballots": [{**ids, "voice": voice, **skipped_ballot()} for voice in voices]})
    debated = await debate(
        engine,
        [{"role": "user", "content": row["question"]}],
        (row["response_a"], row["response_b"]),
        settings.templates,
        settings.rules,
        debater.sampling or settings.sampling,
        settings.asking,
    )
    ballots = [
        {**ids, "voice": role, **ballot_of(look)}
        for role, judgement in debated.voices.items()
        for look in judgement.looks
    ]
    speeches = [{**ids, **vars(speech), "order": _order(speech.order)} for speech in debated.speeches]
    replies = [reply for voice in debated.voices.values() for reply in judged(f"debater {debater.name}", voice)]
    return Outcome({"ballots": ballots, "speeches": speeches}, replies)


def judged(name: str, judgement: Judgement) -> list[tuple[str, bool]]:
    """`Outcome.replies` of a judgement; a prompt that is too long is not the judge's fault."""
    return [] if judgement.parse_status == "too_long" else [(name, judgement.read)]


ASK = Asking(
    tables={"ballots": BALLOTS},
    items=_items,
    ask=_ask,
    role=lambda settings, item: f"ask/{item.strategy.name}",
    counts=count_by("ballots", "strategy", "judge", "parse_status"),
)

DEBATE = Asking(
    tables={"ballots": BALLOTS, "speeches": SPEECHES}, items=_debates, ask=_debate, role="debate", counts=ASK.counts
)


def ballot_of(look: Look) -> Row:
    """One look at two answers, as columns of a ballot."""
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


def skipped_ballot(order: tuple[int, ...] = (0, 1)) -> Row:
    """Columns of a ballot without a call, because something that a judge must see is missing."""
    nothing = dict.fromkeys(("score_a", "score_b", "vote", "reason", "raw"))
    return {"order": _order(order), **nothing, "parse_status": "skipped"}

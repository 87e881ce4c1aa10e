"""The judges of a card: every item of the sets and probes, by one strategy for pairs and one for more answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import Field, field_serializer, field_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import LABELS, Strategy, StrategyAsking, StrategyTemplates, decide
from ray_pipeline.agents.templates import Layout, LayoutKey
from ray_pipeline.agreement.ask import LiveJudge, judged
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, count_by
from ray_pipeline.graph.stage import Stage
from ray_pipeline.store.schemas import CARD_VERDICTS


class CardAsking(Settings):
    """The `ask` block of a judge card: the judges, and how they judge."""

    judges: tuple[LiveJudge, ...] = Field(
        (), description="default: one judge for each model, with the model's key as name"
    )
    pairs: Strategy = Field(Strategy(kind="direct", orders="both"), description="how two answers are judged")
    many: Strategy = Field(Strategy(kind="best"), description="how more than two answers are judged (RewardBench 2)")
    strategy_templates: str = Field("default", description="built-in name or YAML file of the judges' texts")
    layout: LayoutKey = "shared_first"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    asking: StrategyAsking = StrategyAsking()

    @field_validator("judges")
    @classmethod
    def _distinct(cls, judges: tuple[LiveJudge, ...]) -> tuple[LiveJudge, ...]:
        refuse_repeated((judge.name for judge in judges), "judges")
        return judges

    @field_validator("pairs", "many")
    @classmethod
    def _counted_later(cls, strategy: Strategy) -> Strategy:
        if "conflict" in strategy.model_fields_set:
            raise ValueError("conflict has no effect here: each set has its own rule for two orders; remove it")
        return strategy

    @field_serializer("pairs", "many")
    def _as_set(self, strategy: Strategy) -> dict[str, object]:
        """Without the key that is refused, so that a run's config.yaml can be loaded again."""
        return strategy.model_dump(mode="json", exclude={"conflict"})


class _Asked(Settings):
    judges: tuple[LiveJudge, ...]
    families: dict[str, str]
    pairs: Strategy
    many: Strategy
    templates: StrategyTemplates
    layout: Layout
    sampling: SamplingSettings
    asking: StrategyAsking


def card_asking_stages(
    settings: CardAsking,
    templates: StrategyTemplates,
    models: Mapping[str, ModelSettings],
    families: Mapping[str, str],
    items: Stage,
) -> list[Stage]:
    """One stage per model.

    Args:
        families: judge → family of its model.
    """
    stages = []
    for key in dict.fromkeys(judge.model for judge in settings.judges):
        judges = tuple(judge for judge in settings.judges if judge.model == key)
        own = {judge.name: families[judge.name] for judge in judges}
        asked = _Asked.part_of(settings, judges=judges, families=own, templates=templates)
        stages.append(CARD_ASKING.stage(f"ask-{key}", asked, models[key], {"items": items}, group="ask"))
    return stages


class _Item(NamedTuple):
    """An item (a row of schema CARD_ITEMS), and who judges it."""

    prompt_id: str
    row: Row
    judge: LiveJudge


def _items(shard: ShardTables, settings: _Asked) -> list[_Item]:
    return [
        _Item(row["prompt_id"], row, judge)
        for row in shard.rows("items")
        for judge in settings.judges
        if row["family"] in (None, settings.families[judge.name])
    ]


async def _ask(engine: ChatEngine, settings: _Asked, item: _Item) -> Outcome:
    row, judge = item.row, item.judge
    strategy = settings.pairs if len(row["answers"]) == 2 else settings.many
    judgement = await decide(
        engine,
        [{"role": "user", "content": row["question"]}],
        row["answers"],
        strategy if judge.rubric is None else strategy.model_copy(update={"rubric": judge.rubric}),
        settings.templates,
        judge.sampling or settings.sampling,
        settings.asking,
        settings.layout,
    )
    ids = {name: row[name] for name in ("item_id", "prompt_id", "source")}
    verdicts = [
        {
            **ids,
            "judge": judge.name,
            "strategy": strategy.name,
            "order": _labels(look.order),
            "best": _labels(look.best) or None,
            "reason": look.reason,
            "parse_status": look.parse_status,
            "raw": look.raw,
        }
        for look in judgement.looks
    ]
    return Outcome({"card_verdicts": verdicts}, judged(f"judge {judge.name}", judgement))


def _labels(answers: tuple[int, ...]) -> str:
    return "".join(LABELS[number] for number in answers)


CARD_ASKING = Asking(
    tables={"card_verdicts": CARD_VERDICTS},
    items=_items,
    ask=_ask,
    role=lambda settings, item: f"card/{item.row['source']}",
    counts=count_by("card_verdicts", "source", "judge", "parse_status"),
)

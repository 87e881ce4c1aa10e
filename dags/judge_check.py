"""Judge check: public sets and built-in probes with known answers → a card of each judge, before a run pays for it.

public sets ─┬→ judges, one stage a model → card
probes ──────┘
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.strategies import StrategyTemplates, load_strategy_templates
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.agreement.panel import family
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.settings import refuse_repeated
from ray_pipeline.config.starters import Starter
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.extensions import register
from ray_pipeline.graph.stage import Dag
from ray_pipeline.judge_card.ask import CardAsking, card_asking_stages
from ray_pipeline.judge_card.cards import CARD_FILE
from ray_pipeline.judge_card.probes import ProbeSettings
from ray_pipeline.judge_card.sets import SETS, PublicSet
from ray_pipeline.judge_card.stages import CardPage, MeasureCard, card_items_stage, card_stage, rewrite_page
from ray_pipeline.store.keys import check_num_shards, digest
from ray_pipeline.workflow.config import RunConfig, judge_uses
from ray_pipeline.workflow.registry import Workflow


class JudgeCheckConfig(RunConfig):
    """The configuration of `quorum judge-check` and `quorum run judge_check`."""

    run: RunBlock = RunBlock(name="judge_check")
    sets: tuple[PublicSet, ...] = Field((), description="public sets to judge")
    probes: ProbeSettings | None = Field(ProbeSettings(), description="built-in probes; null: none")
    families: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="family → how the names of its models begin; default: their first word"
    )
    ask: CardAsking = CardAsking()
    measure: MeasureCard = MeasureCard()
    num_shards: int = Field(4, description="shards of every table; a power of two up to 1024")

    @field_validator("num_shards")
    @classmethod
    def _shards(cls, num_shards: int) -> int:
        return check_num_shards(num_shards)

    @model_validator(mode="after")
    def _something_to_judge(self) -> JudgeCheckConfig:
        refuse_repeated((one.type for one in self.sets), "sets")
        if not self.sets and self.probes is None:
            raise ValueError("there is nothing to judge: list `sets`, or remove `probes: null`")
        if not self.judges:
            raise ValueError("models is empty; name the model of at least one judge")
        return self

    @property
    def judges(self) -> tuple[LiveJudge, ...]:
        return self.ask.judges or tuple(LiveJudge(name=key, model=key) for key in self.models)

    def uses(self) -> Sequence[ModelUse]:
        asked = {"ask.sampling": self.ask.sampling}
        return [use for j in self.judges for use in judge_uses(f"ask.judges.{j.name}", j.model, asked, j.sampling)]

    def strategy_templates(self) -> StrategyTemplates:
        return load_strategy_templates(self.ask.strategy_templates)

    def judge_families(self) -> dict[str, str]:
        """Judge → family of its model."""
        return {j.name: family(self.models[j.model].shown, self.families) or "" for j in self.judges}

    def page(self) -> CardPage:
        texts = digest(self.strategy_templates().decisive(), size=4)
        ask, families = self.ask, self.judge_families()
        return CardPage(
            judges=tuple(
                {
                    "judge": j.name,
                    "model": self.models[j.model].shown,
                    "identity": self.models[j.model].weights(),
                    "family": families[j.name],
                    "protocol": f"pairs by {ask.pairs.name}, orders: {ask.pairs.orders}; texts "
                    f"{ask.strategy_templates} ({texts})" + (f"; rubric {j.rubric}" if j.rubric else ""),
                }
                for j in self.judges
            ),
            asked={j.name: f"ask-{j.model}" for j in self.judges},
            probes={} if self.probes is None else {name: p.about for name, p in self.probes.load().probes.items()},
            currency=self.currency(),
            measure=self.measure,
        )

    def check(self) -> None:
        super().check()
        templates = self.strategy_templates()
        if self.probes is not None or any(not SETS[one.type].many for one in self.sets):
            templates.of(self.ask.pairs)
        if any(SETS[one.type].many for one in self.sets):
            templates.of(self.ask.many)
        if self.probes is not None:
            self.probes.load()


def judge_check(config: JudgeCheckConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    families = config.judge_families()
    probes = None if config.probes is None else config.probes.load()
    items = card_items_stage(config.sets, probes, list(families.values()))
    ask = config.ask.model_copy(update={"judges": config.judges})
    verdicts = card_asking_stages(ask, config.strategy_templates(), config.models, families, items)
    return Dag("judge_check", [items, *verdicts, card_stage(config.page(), items, verdicts)])


WORKFLOW = register("workflow", "judge_check")(
    Workflow(
        name="judge_check",
        pocket="pocket_judge_check",
        starters={
            "laptop": Starter("pocket_judge_check"),
            "gpus": Starter("judge_check"),
            "endpoint": Starter("judge_check", at_endpoint=True),
        },
        config=JudgeCheckConfig,
        wire=judge_check,
        page=rewrite_page,
        numbers=CARD_FILE,
    )
)

"""Agreement: items with human labels → verdicts, recorded or live → how far they agree.

items ─┬→ judges, one stage a model ──┐
       ├→ debates, one stage a model ─┴→ agreement
       └→ recorded verdicts ──────────┘
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_pipeline.agents.debate import DebateTemplates, load_debate_templates
from ray_pipeline.agents.strategies import StrategyTemplates, load_strategy_templates
from ray_pipeline.agreement.ask import AskSettings, ask_stages
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.stages import AgreementData, AgreementPage, items_stage, report_stage, rewrite_page
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.starters import Starter
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.extensions import register
from ray_pipeline.graph.stage import Dag
from ray_pipeline.workflow.config import RunConfig, judge_uses
from ray_pipeline.workflow.registry import Workflow


class AgreementConfig(RunConfig):
    """The configuration of `quorum run agreement`."""

    run: RunBlock = RunBlock(name="agreement")
    data: AgreementData
    measure: MeasureSettings = MeasureSettings()
    ask: AskSettings = AskSettings()

    def uses(self) -> Sequence[ModelUse]:
        ask = self.ask
        asked = {"ask.sampling": ask.sampling}
        speaking = {**asked, "ask.debate.speech": ask.debate.speech}
        return [
            *(use for j in ask.judges for use in judge_uses(f"ask.judges.{j.name}", j.model, asked, j.sampling)),
            *(use for j in ask.debaters for use in judge_uses(f"ask.debaters.{j.name}", j.model, speaking, j.sampling)),
        ]

    @property
    def num_shards(self) -> int:
        return self.data.num_shards

    def strategy_templates(self) -> StrategyTemplates:
        return load_strategy_templates(self.ask.strategy_templates)

    def debate_templates(self) -> DebateTemplates:
        return load_debate_templates(self.ask.debate_templates)

    def page(self) -> AgreementPage:
        judges = (*self.ask.judges, *self.ask.debaters)
        return AgreementPage(
            workflow="agreement",
            data=self.data.label,
            replay=self.data.told(bool(judges)),
            measure=self.measure,
            judge_models={j.name: self.models[j.model].shown for j in judges},
        )

    def check(self) -> None:
        super().check()
        templates = self.strategy_templates()
        for strategy in self.ask.strategies:
            templates.of(strategy)
        try:
            self.ask.debate.speakers(self.debate_templates().roles)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def agreement(config: AgreementConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    items = items_stage(config.data)
    strategies, debates = config.strategy_templates(), config.debate_templates()
    ballots = ask_stages(config.ask, strategies, debates, config.models, items)
    return Dag("agreement", [items, *ballots, report_stage(config.page(), items, ballots)])


#: A starter file asks judges about a public set, without a file of the user's own.
_PUBLIC = {
    "data": "data:\n  type: mt_bench   # human votes, from the Hub; for judgements of your own: recorded, with a path\n"
    "  num_shards: 8\n"
}

WORKFLOW = register("workflow", "agreement")(
    Workflow(
        name="agreement",
        pocket="pocket_agreement",
        starters={
            "laptop": Starter("pocket_agreement"),
            "gpus": Starter("agreement", live=True, blocks=_PUBLIC),
            "endpoint": Starter("agreement", live=True, at_endpoint=True, blocks=_PUBLIC),
        },
        config=AgreementConfig,
        wire=agreement,
        page=rewrite_page,
        numbers="agreement.json",
    )
)

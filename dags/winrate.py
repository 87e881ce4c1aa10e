"""Win rates of configurations against baselines.

recorded verdicts ─────────────────────────────────────→ winrate

prompts ─┬→ each model alone ──┬→ versus (one judge) ──→ winrate
         └→ its feedback loops ┘
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import model_validator

from ray_pipeline.agreement.stages import (
    AgreementData,
    AgreementPage,
    WinrateMeasure,
    items_stage,
    report_stage,
    rewrite_page,
)
from ray_pipeline.agreement.versus import LiveWinrate, versus_stages
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.extensions import register
from ray_pipeline.graph.stage import Dag
from ray_pipeline.workflow.config import RunConfig, judge_uses
from ray_pipeline.workflow.registry import Workflow


class WinrateConfig(RunConfig):
    """The configuration of `quorum run winrate`: recorded verdicts (`data`), or models to compare (`live`)."""

    run: RunBlock = RunBlock(name="winrate")
    data: AgreementData | None = None
    live: LiveWinrate | None = None
    measure: WinrateMeasure = WinrateMeasure()

    def uses(self) -> Sequence[ModelUse]:
        live = self.live
        if live is None:
            return []
        generators = [(f"live.configurations.{c.name}.generator", c.generator) for c in live.compared]
        generators += [("live.baselines", key) for key in live.against]
        sampling, reviewing, judge = live.loop.sampling, live.loop.reviewing, live.judge
        uses = [ModelUse("live.judge.model", judge.model, "judge", "live.judge.sampling", judge.sampling.extra)]
        uses += [ModelUse(key, model, "generate", "live.loop.sampling", sampling.extra) for key, model in generators]
        for r in (r for c in live.compared for r in c.reviewers):
            uses += judge_uses(f"reviewers.{r.name}", r.model, {"live.loop.reviewing": reviewing}, r.sampling)
        return uses

    @model_validator(mode="after")
    def _consistent(self) -> WinrateConfig:
        if (self.data is None) == (self.live is None):
            raise ValueError("set either `data` (recorded verdicts: data.path=FILE.jsonl.gz) or `live` (models)")
        if self.live is not None and self.live.judge.kind == "direct" and self.measure.conflict == "mean":
            raise ValueError("measure.conflict mean needs scores, which a direct comparison lacks; use tie or given")
        return self

    @property
    def num_shards(self) -> int:
        if self.live is not None:
            return self.live.prompts.num_shards
        assert self.data is not None
        return self.data.num_shards

    def page(self) -> AgreementPage:
        if self.live is not None:
            return AgreementPage(
                workflow="winrate",
                data=self.live.label,
                replay="asked in this run",
                winrate=self.measure,
                asked=self.live.protocol(self.models),
                models={key: model.shown for key, model in self.models.items()},
            )
        assert self.data is not None
        return AgreementPage(
            workflow="winrate", data=self.data.label, replay=self.data.told(False), winrate=self.measure
        )

    def check(self) -> None:
        super().check()
        if self.live is not None:
            self.live.loop.texts()
            self.live.judge.texts().of(self.live.judge.strategy)


def winrate(config: WinrateConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    if config.live is None:
        assert config.data is not None
        items = items_stage(config.data)
        return Dag("winrate", [items, report_stage(config.page(), items)])
    prompts = prompts_stage(config.live.prompts)
    responses, ballots = versus_stages(config.live, config.models, prompts)
    return Dag(
        "winrate", [prompts, *responses, ballots, report_stage(config.page(), ballots, behind=[prompts, *responses])]
    )


WORKFLOW = register("workflow", "winrate")(
    Workflow(
        name="winrate",
        pocket="pocket_winrate",
        starters={"laptop": Starter("pocket_winrate"), "gpus": Starter("fellowship_winrate")},
        config=WinrateConfig,
        wire=winrate,
        page=rewrite_page,
        numbers="winrate.json",
    )
)

"""What `quorum run agreement` and `quorum run winrate` read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ray_pipeline.agents.debate import DebateTemplates, load_debate_templates
from ray_pipeline.agents.strategies import StrategyTemplates, load_strategy_templates
from ray_pipeline.agreement.ask import AskSettings
from ray_pipeline.agreement.document import MeasureSettings
from ray_pipeline.agreement.stages import AgreementData, AgreementPage, WinrateMeasure
from ray_pipeline.agreement.versus import LiveWinrate
from ray_pipeline.config import CallsBlock, ConfigError, RayBlock, RunBlock, check_models, check_sampling
from ray_pipeline.config import _shown as shown_model
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.store.settings import Settings

ModelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _AgreementRun(Settings):
    """What both workflows have in common."""

    run: RunBlock = RunBlock()
    models: dict[ModelKey, ModelSettings] = Field(default_factory=dict)
    failure: FailureSettings = FailureSettings()
    calls: CallsBlock = CallsBlock()
    ray: RayBlock = RayBlock()

    def run_folder(self, run_dir: str | None = None) -> str:
        return self.run.folder(run_dir)

    def calls_root(self, run_folder: str) -> str:
        return self.calls.folder(run_folder)


class AgreementConfig(_AgreementRun):
    """Everything that `quorum run agreement` reads."""

    run: RunBlock = RunBlock(name="agreement")
    data: AgreementData
    measure: MeasureSettings = MeasureSettings()
    ask: AskSettings = AskSettings()

    @model_validator(mode="after")
    def _consistent(self) -> AgreementConfig:
        for judge in (*self.ask.judges, *self.ask.debaters):
            if judge.model not in self.models:
                known = f"there are {', '.join(self.models)}" if self.models else "there are none"
                raise ValueError(
                    f"ask: {judge.name} sits on model {judge.model!r}, and models has no such key; {known}"
                )
        if idle := sorted(set(self.models) - set(self.ask.models)):
            raise ValueError(f"models.{idle[0]} is read by no judge; remove it, or name it in ask.judges")
        return self

    @property
    def num_shards(self) -> int:
        return self.data.num_shards

    def strategy_templates(self) -> StrategyTemplates:
        return load_strategy_templates(self.ask.strategy_templates)

    def debate_templates(self) -> DebateTemplates:
        return load_debate_templates(self.ask.debate_templates)

    def page(self) -> AgreementPage:
        """What the report says beside the tables."""
        asked = bool(self.ask.judges or self.ask.debaters)
        return AgreementPage(
            workflow="agreement",
            data=self.data.label,
            replay=self.data.told(asked),
            measure=self.measure,
            judge_models={
                j.name: shown_model(self.models[j.model].model) for j in (*self.ask.judges, *self.ask.debaters)
            },
        )

    def check(self) -> None:
        """What types cannot say. Raises ConfigError or TemplateError."""
        check_models(self.models)
        judges, debaters = self.ask.judges, self.ask.debaters
        check_sampling(
            self.models,
            {
                "ask.sampling": (self.ask.models, self.ask.sampling.extra),
                "ask.debate.speech": ([d.model for d in debaters], self.ask.debate.speech.extra),
                **{f"ask.judges.{j.name}.sampling": ([j.model], j.sampling.extra) for j in judges if j.sampling},
                **{f"ask.debaters.{d.name}.sampling": ([d.model], d.sampling.extra) for d in debaters if d.sampling},
            },
        )
        templates = self.strategy_templates()
        for strategy in self.ask.strategies:
            templates.of(strategy)
        roles = self.debate_templates().roles
        try:
            self.ask.debate.speakers(roles)
        except ValueError as error:
            raise ConfigError(str(error)) from error


class WinrateConfig(_AgreementRun):
    """Everything that `quorum run winrate` reads: recorded verdicts (`data`), or models that are asked (`live`)."""

    run: RunBlock = RunBlock(name="winrate")
    data: AgreementData | None = None
    live: LiveWinrate | None = None
    measure: WinrateMeasure = WinrateMeasure()

    @model_validator(mode="after")
    def _consistent(self) -> WinrateConfig:
        if (self.data is None) == (self.live is None):
            raise ValueError("name either `data` (recorded verdicts: data.path=FILE.jsonl.gz) or `live` (models)")
        asked = [] if self.live is None else self.live.models
        for key in asked:
            if key not in self.models:
                known = f"there are {', '.join(self.models)}" if self.models else "there are none"
                raise ValueError(f"live names the model {key!r}, and models has no such key; {known}")
        if idle := sorted(set(self.models) - set(asked)):
            raise ValueError(f"models.{idle[0]} is read by nothing; remove it, or name it under live")
        if self.live is not None and self.measure.conflict == "mean":
            raise ValueError("measure.conflict is mean, and a direct comparison gives no scores; it is tie or given")
        return self

    @property
    def num_shards(self) -> int:
        if self.live is not None:
            return self.live.prompts.num_shards
        assert self.data is not None
        return self.data.num_shards

    def page(self) -> AgreementPage:
        """What the report says beside the tables."""
        if self.live is not None:
            return AgreementPage(
                workflow="winrate",
                data=self.live.label,
                replay="asked in this run",
                winrate=self.measure,
                asked=self.live.protocol(self.models),
            )
        assert self.data is not None
        return AgreementPage(
            workflow="winrate", data=self.data.label, replay=self.data.told(False), winrate=self.measure
        )

    def check(self) -> None:
        """What types cannot say. Raises ConfigError or TemplateError."""
        if self.live is None:
            return
        live = self.live
        check_models(self.models)
        live.loop.texts()
        live.judge.texts().of(live.judge.strategy)
        generators = list(dict.fromkeys([*(c.generator for c in live.compared), *live.against]))
        reviewers = [r for c in live.compared for r in c.reviewers]
        check_sampling(
            self.models,
            {
                "live.loop.sampling": (generators, live.loop.sampling.extra),
                "live.loop.reviewing": ([r.model for r in reviewers], live.loop.reviewing.extra),
                "live.judge.sampling": ([live.judge.model], live.judge.sampling.extra),
                **{f"reviewers.{r.name}.sampling": ([r.model], r.sampling.extra) for r in reviewers if r.sampling},
            },
        )


#: Workflow → its configuration class.
AGREEMENT_CONFIGS: dict[str, type[_AgreementRun]] = {"agreement": AgreementConfig, "winrate": WinrateConfig}

"""Fellowship: generator and reviewers improve responses, a judge picks the best, and the policy learns from the pick.

prompts → generate-1 → review-1 → generate-2 → … → generate-N → judge → select → datasets → train → evaluate

With `train: null` only the data is made, and the report is about it: … → select → datasets → report.

The second kind of data (`improve`): preferences over several reviews and revisions by the judge's scores.

prompts → responses → reviews → revisions → judge ─┬→ revisions given the feedback → datasets
                                                  └→ reviews ────────────────────→ datasets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from dags.dmapo import trained
from ray_pipeline.audit.run import Audit, audit_picks
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.datasets import dataset_files, dataset_rows
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.extensions import register
from ray_pipeline.feedback.improve import ImproveSettings, branch_stages
from ray_pipeline.feedback.improvement_rows import improvement_rows
from ray_pipeline.feedback.loop import LoopSettings, feedback_stages
from ray_pipeline.feedback.page import LoopPage, loop_page, rewrite_page
from ray_pipeline.feedback.select import SelectSettings, ranks, select
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.spec import POLICIES, TrainSettings
from ray_pipeline.workflow.config import judge_uses
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.training import TrainingConfig, rubric_models, rubric_uses

#: Stages that the report shows, in the order of the workflow.
REPORTED = ("prompts", "candidates", "judge", "datasets", "train", "evaluate")


class FellowshipConfig(TrainingConfig):
    """The configuration of `quorum run fellowship`."""

    run: RunBlock = RunBlock(name="fellowship")
    loop: LoopSettings = LoopSettings()
    judge: JudgeSettings | None = Field(
        None,
        description="rubric judges of the evaluation, and of the responses if `select` has neither strategy nor debate",
    )
    select: SelectSettings = SelectSettings()
    datasets: DatasetsConfig = DatasetsConfig(min_gap=0.0)
    improve: ImproveSettings | None = Field(None, description="the second kind of datasets; default: none")
    train: TrainSettings | None = Field(
        TrainSettings(method="dpo", model="generator"), description=TrainingConfig.model_fields["train"].description
    )

    def uses(self) -> Sequence[ModelUse]:
        loop, select, improve = self.loop, self.select, self.improve
        uses = [ModelUse("loop.generator", loop.generator, "generate", "loop.sampling", loop.sampling.extra)]
        for r in loop.reviewers:
            asked = {"loop.reviewing": loop.reviewing}
            asked |= {} if improve is None else {"improve.reviewing": improve.reviewing}
            uses += judge_uses(f"loop.reviewers.{r.name}", r.model, asked, r.sampling)
        for j in select.judges:
            asked = {"select.sampling": select.sampling}
            asked |= {} if select.debate is None else {"select.debate.speech": select.debate.speech}
            uses += judge_uses(f"select.judges.{j.name}", j.model, asked, j.sampling)
        if improve is not None:
            uses.append(
                ModelUse("loop.generator", loop.generator, "generate", "improve.sampling", improve.sampling.extra)
            )
        if improve is not None and self.train is not None:
            # Rows of the second kind are measured in tokens of the models that wrote them.
            uses += [
                ModelUse("loop.generator", loop.generator, "count tokens"),
                ModelUse("loop.reviewers.0.model", loop.reviewers[0].model, "count tokens"),
                *(ModelUse(key, model, "train") for key, model in self.improved().items()),
            ]
        return [*uses, *super().uses(), *([] if self.judge is None else rubric_uses(self.judge))]

    @model_validator(mode="after")
    def _consistent(self) -> FellowshipConfig:
        if self.judge is None and not self.select.compares:
            raise ValueError(
                "no judge for the responses: add a judge block with rubrics, or select.strategy and select.judges"
            )
        if self.judge is not None and self.judge.source is not None:
            raise ValueError("judge.source has verdicts of ready responses, but the loop writes new ones; use rubrics")
        if self.judge is not None and (self.judge.early_exit != "off" or self.judge.escalate):
            raise ValueError(
                f"judge.{'escalate' if self.judge.escalate else 'early_exit'} skips what a gate does not need, but "
                "this workflow has none; remove it"
            )
        try:
            self.select.jury.check(self.judges)
        except ValueError as error:
            raise ValueError(f"select.jury.{error}") from error
        if self.loop.responses < 2:
            raise ValueError("loop.responses must be 2 or more: a single response is neither accepted nor rejected")
        own = None if self.improve is None else self.improve.prompts
        if own is not None and own.num_shards != self.prompts.num_shards:
            raise ValueError(
                f"improve.prompts.num_shards is {own.num_shards}, but prompts.num_shards is {self.prompts.num_shards}; "
                "set both to the same number"
            )
        return self

    def check(self) -> None:
        super().check()
        self.loop.texts()
        if self.select.strategy is not None:
            self.select.texts().of(self.select.strategy)
        if self.select.debate is not None:
            texts = self.select.debate_texts()
            # The second kind of data has more responses to a prompt than the loop.
            if not texts.shows(self.loop.responses if self.improve is None else max(self.loop.responses, 3)):
                raise ConfigError(
                    f"select.debate_templates {self.select.debate_templates} does not show all responses of a prompt; "
                    "use a file whose `shared` loops over `answers`, as default does"
                )
            try:
                self.select.debate.speakers(texts.roles)
            except ValueError as error:
                raise ConfigError(f"select.{error}") from error

    def improved(self) -> dict[str, str]:
        """Trainings on the second kind of data: stage → the key of the model that it starts from."""
        if self.improve is None or self.train is None:
            return {}
        models = {"revisions": self.loop.generator, "reviews": self.loop.reviewers[0].model}
        return {f"train-{what}": models[what] for what in self.improve.train}

    def workers(self) -> dict[str, float]:
        workers = super().workers()
        return workers | dict.fromkeys(self.improved(), workers.get("train", 0))

    @property
    def judges(self) -> list[str]:
        """Names of the judges that select the best response."""
        if self.select.compares:
            return self.select.names
        assert self.judge is not None
        return self.judge.names

    def report(self) -> ReportSettings:
        """The facts of the report that are in no table."""
        if self.select.compares:
            judging = {j.name: j.model for j in self.select.judges}
            unscored = list(judging)
        else:
            assert self.judge is not None
            judging = rubric_models(self.judge)
            unscored = [program.name for program in self.judge.programs]
        stages = [stage for stage in REPORTED if self.train or stage not in ("train", "evaluate")]
        return self.report_of(judging, workflow="fellowship", stages=stages, no_error_rates=unscored)

    def origin(self, what: str = "Best of the responses") -> Provenance:
        """How the preferences were made, for the dataset cards."""
        judged = ", ".join(self.judges)
        how = f" by {self.select.how}" if self.select.how else ""
        if len(self.judges) > 1:
            how += f" (a jury: {self.select.jury.pool})"
        loop = f"a feedback loop of {self.loop.responses} responses reviewed by {', '.join(self.loop.names)}"
        return Provenance.of(self, f"{what} of {loop}, judged by {judged}{how}")


def fellowship(config: FellowshipConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; the evaluation loads the policy from `run_folder`."""
    limits, counting = config.datasets, config.counting
    every = config.select.pairs == "every_rejected"

    prompts = prompts_stage(config.prompts)
    candidates, generated, reviews = feedback_stages(config.loop, config.models, prompts)
    verdicts = _judged(config, prompts, {"candidates": candidates}, "judge")
    decisions = select(config.judges, candidates, verdicts, config.select.jury, cut=config.select.cut)
    rows = dataset_rows(limits, config.judges, counting, prompts, candidates, verdicts, decisions, every_rejected=every)
    datasets = dataset_files(
        limits, None, config.judges, rows, counting, origin=config.origin(), trained_on=config.train is not None
    )
    page = loop_page(
        LoopPage(
            run_name=config.run.name,
            reviewers=tuple(config.loop.names),
            checker=config.evaluate.checker,
            models={key: model.shown for key, model in config.models.items()},
        ),
        [prompts, *generated, *reviews, candidates, *verdicts, decisions],
    )
    curated = [prompts, candidates, *verdicts, decisions, datasets]
    policy = [] if config.train is None else trained(config, run_folder, prompts, datasets, config.judge)
    report = config.report_stage([*curated, *policy])
    improved = [] if config.improve is None else _improvement(config, prompts)
    return Dag("fellowship", [*generated, *curated, page, *improved, *policy, report])


def _judged(
    config: FellowshipConfig, prompts: Stage, responses: Mapping[str, Stage], name: str, holds: str = ""
) -> list[Stage]:
    """Verdicts on all responses by the strategy or debate of `select`, or by the rubric judges."""
    if config.select.compares:
        return ranks(config.select, config.models, prompts, responses, name, holds)
    assert config.judge is not None
    return judge_stages(config.judge, config.models, config.templates(), prompts, responses, name, holds=holds)


def _improvement(config: FellowshipConfig, prompts: Stage) -> list[Stage]:
    """Datasets over revisions given the feedback, and over reviews, and the policies trained on them."""
    settings, loop, models = config.improve, config.loop, config.models
    assert settings is not None
    own = prompts
    if settings.prompts is not None:
        own = dataclasses.replace(
            prompts_stage(settings.prompts), name="improve-prompts", group="improve-prompts", role="branch prompts"
        )
    # The loop's own first responses, generated for these prompts: equal calls are made once.
    _, (first,), _ = feedback_stages(loop.model_copy(update={"responses": 1}), models, own)
    first = dataclasses.replace(first, name="improve-generate", role="branch candidates")
    branches = branch_stages(settings, loop, models, own, first)
    responses = {"responses": branches.responses, "revisions": branches.revisions}
    verdicts = _judged(config, own, responses, "improve-judge", "branch verdicts")
    made = []
    for what, key, origin in (
        ("revisions", loop.generator, "Revisions given the feedback"),
        ("reviews", loop.reviewers[0].model, "Reviews by what their revisions scored"),
    ):
        counting = config.counting if config.train is None else models[key]
        rows = improvement_rows(
            what, config.datasets, config.judges, config.select, loop, counting, own, branches, verdicts
        )
        name, trains = f"datasets-{what}", f"train-{what}"
        files = dataset_files(
            config.datasets,
            None,
            config.judges,
            rows,
            counting,
            name=name,
            view=name,
            origin=config.origin(origin),
            trained_on=trains in config.improved(),
        )
        files = dataclasses.replace(files, group="improve", role="branch datasets")
        made.append(files)
        if config.train is not None and trains in config.improved():
            limit, view = config.datasets.max_length, f"policy-{what}"
            made.append(train_stage(config.train, models[key], limit, files, name=trains, view=view, role=POLICIES[1]))
    return made


def audit(run: Run, config: FellowshipConfig) -> Audit:
    """Walk every row of the picks back. Raises StoreError where the run has no datasets yet."""
    every = config.select.pairs == "every_rejected"
    return audit_picks(run, config.judges, config.select.jury, config.datasets.min_gap, config.select.cut, every)


WORKFLOW = register("workflow", "fellowship")(
    Workflow(
        name="fellowship",
        pocket="pocket_fellowship",
        starters={
            "laptop": Starter("pocket_fellowship"),
            "gpus": Starter("fellowship"),
            "endpoint": Starter("fellowship", at_endpoint=True),
        },
        config=FellowshipConfig,
        wire=fellowship,
        page=rewrite_page,
        numbers="metrics.json",
        audit=audit,
    )
)

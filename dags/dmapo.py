"""DMAPO: three judges, a process critic and a confidence gate make the data; KTO aligns the policy with it.

prompts → candidates → judges ─┐
                    └→ critic ─┴→ gate → datasets → train (→ public benchmarks) → evaluate
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.candidates import CandidateSettings
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.critic import CriticSettings
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.evaluate.stage import ReportSettings, write_report
from ray_pipeline.evaluate.stage import evaluate as evaluate_stage
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder, stored
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.training import TrainingConfig, rubric_models, rubric_uses


class DmapoConfig(TrainingConfig):
    """The configuration of `quorum run dmapo`."""

    candidates: CandidateSettings = CandidateSettings()
    judge: JudgeSettings
    critic: CriticSettings = CriticSettings()
    gate: GateConfig = GateConfig()
    benchmarks: BenchmarksSettings | None = Field(
        None, description="public benchmarks as the last stage; default: none"
    )

    def uses(self) -> Sequence[ModelUse]:
        sampling, critic = self.candidates.sampling, self.critic
        return [
            ModelUse("candidates.model", self.candidates.model, "generate", "candidates.sampling", sampling.extra),
            ModelUse("critic.model", critic.model, "judge", "critic.sampling", critic.sampling.extra),
            *super().uses(),
            *rubric_uses(self.judge),
            *([] if self.benchmarks is None else self.benchmarks.uses({"train.model": self.train.model})),
        ]

    @model_validator(mode="after")
    def _benchmark_baseline(self) -> DmapoConfig:
        if self.benchmarks is not None:
            self.benchmarks.check_baselines(["base", *self.policy_labels()])
        return self

    def check(self) -> None:
        super().check()
        if self.benchmarks is not None:
            try:
                self.benchmarks.check()
            except BenchmarkFileError as error:
                raise ConfigError(f"benchmarks: {error}") from error

    def policy_labels(self) -> list[str]:
        """Names of this run's policies in tables."""
        return ["policy"]

    def report(self) -> ReportSettings:
        """The facts of the report that are in no table."""
        return self.report_of(rubric_models(self.judge), gate=self.gate)

    def page(self) -> Settings:
        return self.report()

    def benchmarks_page(self) -> BenchmarksPage:
        """The facts of the public benchmarks' page that are in no table."""
        assert self.benchmarks is not None
        base, curating = self.base, tuple(sorted(set(self.report().curating.values())))
        return BenchmarksPage(
            run_name=self.run.name,
            benchmarks=self.benchmarks,
            models={
                "base": MeasuredModel(shown=base.shown, identity="+".join(base.weights().values())),
                **{label: MeasuredModel(shown=base.shown, curating=curating) for label in self.policy_labels()},
            },
            judges={key: judging_model(self.models[key]) for key in self.benchmarks.judges},
        )


def dmapo(config: DmapoConfig, run_folder: str) -> Dag:
    """The whole method as a DAG; the evaluation loads the policy from `run_folder`."""
    texts, models, base = config.templates(), config.models, config.base

    prompts = prompts_stage(config.prompts)
    candidates = candidates_stage(config.candidates, models[config.candidates.model], prompts)
    verdicts = judge_stages(config.judge, models, texts.judge, prompts, {"candidates": candidates})
    critiques = None
    if config.gate.use_critic:
        critiques = critic_stage(config.critic, models[config.critic.model], texts.critic, prompts, candidates)
    (dataset,) = scored(config)
    decisions = dataset.decide(candidates, verdicts, critiques)
    _, datasets = dataset.write(prompts, candidates, verdicts, decisions)
    stages = [prompts, candidates, *verdicts, *([critiques] if critiques else []), decisions, datasets]
    policy = train_stage(config.train, base, config.datasets.max_length, datasets)
    evaluated = evaluation(config, run_folder, prompts, policy, config.judge)
    trained = [policy, *evaluated, *_benchmarks(config, run_folder, policy)]
    if config.evaluate.skip_generation:
        trained = stored(trained, run_folder, config.num_shards)
    stages += trained
    report = evaluate_stage(config.evaluate, config.report(), base, config.datasets.max_length, stages)
    return Dag("dmapo", [*stages, report])


def scored(config: DmapoConfig) -> list[ScoredDataset]:
    """The dataset that the gate makes."""
    files = {"datasets": config.datasets}
    return [ScoredDataset(config.judge.names, config.gate, config.base, files, view="datasets")]


def evaluation(
    config: TrainingConfig, run_folder: str, prompts: Stage, policy: Stage, judge: JudgeSettings | None
) -> list[Stage]:
    """Responses of base and policy to held-out prompts; one judge compares them in both orders, rubric judges score."""
    texts, models, base = config.templates(), config.models, config.base
    trained = base.trained((stage_folder(run_folder, policy) / "merged").location)
    before = responses_stage("base", config.evaluate, base, prompts)
    after = responses_stage("policy", config.evaluate, trained, prompts, policy)
    compared = comparisons_stage(
        config.evaluate, models[config.evaluate.judge], texts.pairwise, prompts, before, {"policy": after}
    )
    if judge is None:
        return [before, after, compared]
    both = {"base": before, "policy": after}
    return [
        *(before, after, compared),
        *judge_stages(judge, models, texts.judge, prompts, both, "score-responses", "evaluate", "response verdicts"),
    ]


def _benchmarks(config: DmapoConfig, run_folder: str, policy: Stage) -> list[Stage]:
    """Base and policy on public benchmarks, if the configuration has any."""
    if config.benchmarks is None:
        return []
    trained = config.base.trained((stage_folder(run_folder, policy) / "merged").location)
    measured = {"base": Answering(config.base), "policy": Answering(trained, policy)}
    return benchmark_stages(config.benchmarks, config.benchmarks_page(), config.models, measured, view="benchmarks")


def audit(run: Run, config: DmapoConfig) -> Audit:
    """Walk every training row back. Raises StoreError where the run has no datasets yet."""
    return audit_gated(run, scored(config))


WORKFLOW = register("workflow", "dmapo")(
    Workflow(
        name="dmapo",
        config=DmapoConfig,
        wire=dmapo,
        page=write_report,
        numbers="metrics.json",
        audit=audit,
        scored=scored,
    )
)

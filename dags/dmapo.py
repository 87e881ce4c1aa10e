"""DMAPO: three judges, a process critic and a confidence gate make the data; KTO aligns the policy with it.

prompts → candidates → judges ─┐
                    └→ critic ─┴→ gate → datasets → train (→ public benchmarks) → evaluate

With `rounds`, the policy answers the prompts of the next round, from candidates on, and is trained on.

With `train: null` only the data is made, and the report is about it: … → gate → datasets → report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.candidate_sources import CandidatePrompts
from ray_pipeline.data.candidates import CandidateSettings, drawn
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.critic import CriticSettings
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.datasets import Judged
from ray_pipeline.data.early_exit import ExitRule
from ray_pipeline.data.gate import GateConfig, check_pool
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.prompt_parts import prompt_part
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.reviewed import HumanLabels, HumanLabelsKey
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.evaluate.stage import ReportSettings, write_report
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder, stored
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.spec import Reference
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.rounds import Round, RoundsSettings, ending_of, numbered
from ray_pipeline.workflow.training import (
    TrainingConfig,
    given_items,
    recorded_judges,
    require_checker,
    rubric_models,
    rubric_uses,
)


class DmapoConfig(TrainingConfig):
    """The configuration of `quorum run dmapo`."""

    takes_reward_models = True

    candidates: CandidateSettings = CandidateSettings()
    judge: JudgeSettings
    critic: CriticSettings | None = Field(
        CriticSettings(), description="the process critic; null: none, and the gate decides without one"
    )
    gate: GateConfig = GateConfig()
    human_labels: HumanLabelsKey = Field(
        None, description="labels by people from `quorum review`, as a block or as the file alone; default: none"
    )
    benchmarks: BenchmarksSettings | None = Field(
        None, description="public benchmarks as the last stage; default: none"
    )
    rounds: RoundsSettings | None = Field(
        None,
        description="several rounds: the policy of each answers the prompts of the next, and is trained on; default: "
        "one round",
        exclude_if=lambda block: block is None,
    )

    def uses(self) -> Sequence[ModelUse]:
        drawn, critic = self.candidates, self.critic
        key = "candidates.model" if drawn.generators is None else "candidates.generators"
        measured = {} if self.train is None else {"train.model": self.train.model}
        return [
            *(ModelUse(key, model, "generate", "candidates.sampling", drawn.sampling.extra) for model in drawn.drawn),
            *(
                []
                if critic is None
                else [ModelUse("critic.model", critic.model, "judge", "critic.sampling", critic.sampling.extra)]
            ),
            *super().uses(),
            *rubric_uses(self.judge),
            *([] if self.benchmarks is None else self.benchmarks.uses(measured)),
        ]

    @model_validator(mode="before")
    @classmethod
    def _without_critic(cls, values: Any) -> Any:
        """`critic: null` is `gate.use_critic: false` too."""
        if not isinstance(values, Mapping) or "critic" not in values or values["critic"] is not None:
            return values
        gate = values.get("gate", {})
        if isinstance(gate, GateConfig):
            gate = gate.model_dump(exclude_unset=True)
        if not isinstance(gate, Mapping):
            return values
        if gate.get("use_critic"):
            raise ValueError("gate.use_critic is true, but critic is null; remove one of the two")
        return {**values, "gate": {**gate, "use_critic": False}}

    @model_validator(mode="after")
    def _benchmark_baseline(self) -> DmapoConfig:
        if self.benchmarks is not None:
            if not self.trains_policy:
                raise ValueError("benchmarks measures the policy, but none is trained; remove the block, or set train")
            self.benchmarks.check_baselines(["base", *self.policy_labels()])
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> DmapoConfig:
        if self.candidates.source is not None and "sources" in self.prompts.model_fields_set:
            raise ValueError(
                "prompts.sources has no effect with candidates.source, whose rows hold the prompts; remove it"
            )
        return self

    @model_validator(mode="after")
    def _exact_exit(self) -> DmapoConfig:
        """Refuse what would come out differently with fewer calls."""
        scores, humans = set(self.datasets.kinds) - {"kto"}, self.human_labels
        if self.judge.early_exit == "labels" and scores:
            raise ValueError(
                f"judge.early_exit: labels leaves final scores open, but rows of {' and '.join(sorted(scores))} "
                "(datasets.kinds) are chosen by final score; set early_exit to scores, or kinds to [kto]"
            )
        if self.judge.early_exit != "off" and humans is not None and humans.use != "report":
            raise ValueError(
                "judge.early_exit skips calls about candidates that the gate leaves out, but human_labels.use may put "
                "them into a dataset; set early_exit to off, or human_labels.use to report"
            )
        if self.gate.over_all and self.judge.early_exit != "off":
            raise ValueError(
                "judge.early_exit skips calls by the thresholds of the published gate alone; set it to off, or remove "
                f"gate.{'kind' if self.gate.kind != 'published' else 'pool'}"
            )
        if self.gate.kind == "certified" and humans is not None and humans.use == "gate":
            raise ValueError(
                "human_labels.use: gate would replace labels that gate.kind certified promises; set it to report"
            )
        check_pool(self.gate, self.judge.names)
        return self

    @model_validator(mode="after")
    def _rounds_can_follow(self) -> DmapoConfig:
        if len(self.numbers) > 1:
            self._check_rounds()
        return self

    def _check_rounds(self) -> None:
        """Raises ValueError for what rounds after the first cannot have."""
        assert self.rounds is not None
        train, draws = self.train, self.candidates
        if train is None:
            raise ValueError("rounds: the policy of a round answers the prompts of the next, but train is null")
        if draws.source is not None or set(draws.drawn) != {train.model}:
            raise ValueError(
                f"rounds: the policy itself answers in every round; set candidates.model to {train.model} "
                "(train.model), and no source or generators"
            )
        if self.judge.source is not None:
            raise ValueError("rounds: judge.source has no verdicts on the answers of later rounds; use rubrics")
        if self.gate.kind == "certified":
            raise ValueError("rounds: no person has labelled answers of later rounds; set gate.kind to published")
        if self.evaluate.skip_generation:
            raise ValueError("rounds: evaluate.skip_generation leaves out what the curves show; set it to false")
        if self.rounds.continues:
            if train.lora is None or train.save == "merged":
                raise ValueError(
                    f"rounds.data is {self.rounds.data}, so that the adapter of the round before is trained on; set "
                    "train.save to adapter or both (with train.lora), or rounds.data to all"
                )
            if train.shard == "zero3":
                raise ValueError(
                    "rounds: a stored adapter cannot be loaded into zero3's shards; set train.shard to fsdp"
                )

    @property
    def numbers(self) -> range:
        """The rounds, from 1."""
        return range(1, 2 if self.rounds is None else self.rounds.n + 1)

    @property
    def exit_rule(self) -> ExitRule | None:
        """When calls to judges and critic are skipped; None: never."""
        judge = self.judge
        if judge.early_exit == "off":
            return None
        return ExitRule(exact=judge.early_exit, gate=self.gate, judges=tuple(judge.names), scale=judge.scale)

    @property
    def prompt_settings(self) -> PromptsConfig:
        if self.candidates.source is None:
            return self.prompts
        return self.prompts.model_copy(update={"sources": [CandidatePrompts(source=self.candidates.source)]})

    def check(self) -> None:
        super().check()
        for program in self.judge.programs:
            require_checker(f"judge.programs.{program.name}.checker", program.checker, program.options)
        if self.human_labels is not None:
            self.human_labels.read()
        if self.gate.labels is not None:
            HumanLabels(path=self.gate.labels).read()
        if self.benchmarks is not None:
            self.benchmarks.check()

    def policy_labels(self) -> list[str]:
        """Names of this run's policies in tables."""
        return ["policy"]

    def report(self) -> ReportSettings:
        """The facts of the report that are in no table."""
        critic = ["critic"] if self.gate.use_critic else []
        trained = ["train", "evaluate"] if self.trains_policy else []
        return self.report_of(
            rubric_models(self.judge),
            recorded=recorded_judges(self.judge),
            gate=self.gate,
            human_labels=self.human_labels,
            audit_slice=self.judge.early_exit != "off",
            items=given_items(self.judge),
            no_error_rates=[program.name for program in self.judge.programs],
            stages=("prompts", "candidates", "judge", *critic, "gate", "datasets", *trained),
        )

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
    prompts = prompts_stage(config.prompt_settings)
    rounds: list[Round] = []
    for number in config.numbers:
        rounds.append(_round(config, run_folder, number, prompts, rounds))
    if len(rounds) > 1:
        stages = numbered([prompts], rounds)
    else:
        stages = [prompts, *rounds[0].stages]
    return Dag("dmapo", [*stages, config.report_stage(stages)])


def _round(config: DmapoConfig, run_folder: str, number: int, prompts: Stage, before: Sequence[Round]) -> Round:
    """From the candidates to the evaluation of a policy. The first is the whole of a run without rounds."""
    texts, models, rounds, ending = config.templates(), config.models, config.rounds, ending_of(number)
    asked, train = prompts, before[-1].policy if before else None
    if rounds is not None and rounds.splits:
        asked = prompt_part(prompts, (number - 1) % rounds.parts, rounds.parts, f"prompts-{number}")
    if train is not None:
        assert config.train is not None
        model = config.base.trained(stage_folder(run_folder, train).location, config.train.save)
        candidates = drawn(config.candidates, model, asked, f"candidates{ending}", train)
    else:
        candidates = candidates_stage(config.candidates, models, asked, config.prompts.decontaminate)
    rule, judge = config.exit_rule, f"judge{ending}"
    verdicts = judge_stages(config.judge, models, texts, asked, {"candidates": candidates}, judge, exit_rule=rule)
    critiques = None
    if config.gate.use_critic:
        assert config.critic is not None
        critiques = critic_stage(
            config.critic,
            models[config.critic.model],
            texts.critic,
            asked,
            candidates,
            verdicts,
            rule,
            f"critic{ending}",
        )
    dataset = scored(config)[number - 1]
    decisions = dataset.decide(candidates, verdicts, critiques)
    judged = Judged(candidates, verdicts, decisions)
    pooled = [] if rounds is None else rounds.pooled(before)
    _, datasets = dataset.write(prompts, *judged, earlier=[one.judged for one in pooled])
    stages = [candidates, *verdicts, *([critiques] if critiques else []), decisions, datasets]
    if config.train is None:
        return Round(number, judged, stages, None, None)
    after = trained(
        config,
        run_folder,
        prompts,
        datasets,
        config.judge.live,
        functools.partial(_benchmarks, config, run_folder) if number == config.numbers[-1] else None,
        ending=ending,
        start=train if rounds is not None and rounds.continues else None,
        reference=rounds.reference if rounds is not None and before else "base",
        base=before[0].base if before else None,
    )
    named = {stage.name: stage for stage in after}
    return Round(number, judged, [*stages, *after], named.get(f"train{ending}"), named.get("responses-base"))


def scored(config: DmapoConfig) -> list[ScoredDataset]:
    """The datasets that the gate makes, one each round."""
    humans = config.human_labels
    if humans is not None and humans.use == "report":
        humans = None
    return [
        ScoredDataset(
            config.judge.names,
            config.gate,
            config.counting,
            {f"datasets{ending}": config.datasets},
            decisions=f"gate{ending}",
            rows=f"dataset-rows{ending}",
            view="datasets",
            origin=Provenance.of(config),
            humans=humans,
            trained_on=config.train is not None,
            exit_rule=config.exit_rule,
            scale=config.judge.scale,
        )
        for ending in map(ending_of, config.numbers)
    ]


def trained(
    config: TrainingConfig,
    run_folder: str,
    prompts: Stage,
    datasets: Stage,
    judge: JudgeSettings | None,
    more: Callable[[Stage], list[Stage]] | None = None,
    *,
    ending: str = "",
    start: Stage | None = None,
    reference: Reference = "base",
    base: Stage | None = None,
) -> list[Stage]:
    """The policy, and responses of base and policy to held-out prompts; one judge compares them in both orders, rubric
    judges score. With `evaluate.skip_generation`, as they are stored. A reward model alone: held-out pairs measure it.

    Args:
        more: further stages, by that of the policy.
        ending: of the stages' names and of the policy's name in tables.
        start, reference: see `policy.train`.
        base: the base's responses, if they are there.
    """
    assert config.train is not None
    texts, models = config.templates(), config.models
    if not config.trains_policy:
        return [train_stage(config.train, config.base, config.datasets.max_length, datasets, view="reward_model")]
    policy = train_stage(
        config.train,
        config.base,
        config.datasets.max_length,
        datasets,
        name=f"train{ending}",
        start=start,
        reference=reference,
    )
    after_training = config.base.trained(stage_folder(run_folder, policy).location, config.train.save)
    label = f"policy{ending}"
    responses = {"base": base or responses_stage("base", config.evaluate, config.base, prompts)}
    responses[label] = responses_stage(label, config.evaluate, after_training, prompts, policy)
    compared = comparisons_stage(
        config.evaluate,
        models[config.evaluate.judge],
        texts.pairwise,
        prompts,
        responses["base"],
        {label: responses[label]},
        f"comparisons{ending}",
    )
    stages = [policy, *responses.values(), compared]
    if judge is not None:
        stages += judge_stages(
            judge,
            models,
            texts,
            prompts,
            responses,
            f"score-responses{ending}",
            "evaluate",
            "response verdicts",
        )
    stages += [] if more is None else more(policy)
    return stored(stages, run_folder, config.num_shards) if config.evaluate.skip_generation else stages


def _benchmarks(config: DmapoConfig, run_folder: str, policy: Stage) -> list[Stage]:
    """Base and policy on public benchmarks, if the configuration has any."""
    if config.benchmarks is None:
        return []
    assert config.train is not None
    trained = config.base.trained(stage_folder(run_folder, policy).location, config.train.save)
    measured = {"base": Answering(config.base), "policy": Answering(trained, policy)}
    return benchmark_stages(config.benchmarks, config.benchmarks_page(), config.models, measured, view="benchmarks")


def audit(run: Run, config: DmapoConfig) -> Audit:
    """Walk every training row back, of all rounds that have datasets. Raises StoreError where the run has none yet."""
    first, *later = scored(config)
    made = [first, *(one for one in later if one.files.keys() <= run.results.keys())]
    return audit_gated(run, made, judge=config.judge)


WORKFLOW = register("workflow", "dmapo")(
    Workflow(
        name="dmapo",
        pocket="pocket",
        starters={
            "laptop": Starter("laptop"),
            "gpus": Starter("dmapo"),
            "endpoint": Starter("endpoint", at_endpoint=True),
        },
        config=DmapoConfig,
        wire=dmapo,
        page=write_report,
        numbers="metrics.json",
        audit=audit,
        scored=scored,
    )
)

"""The configuration of `quorum run dmapo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.data.candidate_sources import CandidatePrompts
from ray_pipeline.data.candidates import CandidateSettings
from ray_pipeline.data.checkers import default_checker
from ray_pipeline.data.critic import CriticSettings
from ray_pipeline.data.early_exit import ExitRule
from ray_pipeline.data.escalation import CallRule, Escalation
from ray_pipeline.data.gate import GateConfig, check_pool
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.reviewed import HumanLabels, HumanLabelsKey
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.workflow.rounds import RoundsSettings
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
        if self.gate.over_all and self.exit_rule is not None:
            raise ValueError(
                f"{self.exit_rule.key} skips calls by the thresholds of the published gate alone; leave it out, or "
                f"remove gate.{'kind' if self.gate.kind != 'published' else 'pool'}"
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
        if train is None or not self.trains_policy:
            found = "train is null" if train is None else f"train.method {train.method} trains none"
            raise ValueError(f"rounds: the policy of a round answers the prompts of the next, but {found}")
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
        self._check_stop()
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

    def _check_stop(self) -> None:
        """Raises ValueError where a decision of `rounds.stop` has nothing to go by, or comes too late."""
        assert self.rounds is not None
        stop, sources = self.rounds.stop, self.prompt_settings.sources
        if stop is None:
            return
        known = self.evaluate.checker or default_checker(source.label_in_tables for source in sources)
        if stop.metric == "accuracy" and known is None:
            raise ValueError(
                "rounds.stop.metric is accuracy, but no checker knows which responses are right; set evaluate.checker, "
                "or metric to score"
            )
        if self.benchmarks is not None:
            raise ValueError(
                "benchmarks measures the policy of the last round, but rounds.stop decides during the run which policy "
                "is the result; remove the block, and measure the finished run by `quorum run benchmarks`"
            )

    @property
    def numbers(self) -> range:
        """The rounds, from 1."""
        return range(1, 2 if self.rounds is None else self.rounds.n + 1)

    @property
    def exit_rule(self) -> CallRule | None:
        """When calls to judges and the critic are skipped; None: never."""
        judge = self.judge
        if judge.escalate:
            return Escalation(gate=self.gate, levels=judge.escalate)
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
            audit_slice=self.exit_rule is not None,
            levels=self.judge.escalate,
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

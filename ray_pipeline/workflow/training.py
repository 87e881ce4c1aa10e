"""The keys and checks of workflows that make preference data and, unless `train` is null, train a policy on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ray_pipeline.agents.templates import Templates, load_templates
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.constraints.official import CheckersMissing
from ray_pipeline.data.checkers import check_checker, default_checker
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.base import EngineStartError
from ray_pipeline.engines.identity import ModelNotFound
from ray_pipeline.engines.models import ModelSettings, ModelUse, resolve_model
from ray_pipeline.evaluate.stage import ReportSettings, evaluate
from ray_pipeline.extensions import names
from ray_pipeline.graph.stage import Stage
from ray_pipeline.judge_card.cards import CardError, cards_of
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.store.keys import digest
from ray_pipeline.training.methods import TrainingInputError, method_of, validate_trainer_args
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.config import RunConfig, judge_uses


class TrainingConfig(RunConfig):
    """The keys of such a workflow, beside those shared by all workflows."""

    prompt_templates: str = Field("default", description="built-in name or YAML file of the agents' prompts")
    prompts: PromptsConfig = PromptsConfig()
    datasets: DatasetsConfig = DatasetsConfig()
    train: TrainSettings | None = Field(
        TrainSettings(),
        description="how the policy is trained; null: only data is made, and every model may be at an endpoint",
    )
    tokenizer: str | None = Field(
        None,
        description="only where `train` is null: folder, Hub name or `pocket:NAME` of the model whose tokenizer counts "
        "lengths of training rows; default: an estimate of one token per 4 bytes of text",
    )
    evaluate: EvaluateSettings = EvaluateSettings()

    #: Whether the workflow can end with a reward model in place of a policy.
    takes_reward_models: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _benchmarks_of_the_run(cls, values: Any) -> Any:
        """`prompts.decontaminate` without `against`, or with names of benchmarks of the run: their blocks."""
        prompts = _block(values, "prompts")
        block, measured = _block(prompts, "decontaminate"), _block(values, "benchmarks")
        if block is None or measured is None:
            return values
        named = dict(_block(measured, "own") or {})
        for name in set(names("benchmark")) & measured.keys():
            if (keys := _block(measured, name)) is not None:
                named[name] = {"type": name, **keys}
        against = block.get("against", sorted(named))
        if not isinstance(against, list):
            return values
        against = [named.get(one, one) if isinstance(one, str) else one for one in against]
        return {**values, "prompts": {**(prompts or {}), "decontaminate": {**block, "against": against}}}

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards

    @property
    def prompt_settings(self) -> PromptsConfig:
        """Where the prompts come from."""
        return self.prompts

    @property
    def base(self) -> ModelSettings:
        """The model that training starts from. There is none where `train` is null."""
        assert self.train is not None
        return self.models[self.train.model]

    @property
    def trains_policy(self) -> bool:
        """Whether there will be a policy to compare with its base."""
        return self.train is not None and method_of(self.train.method).trains_policy

    @property
    def counting(self) -> ModelSettings | None:
        """The model whose tokenizer counts the tokens of training rows; None for an estimate."""
        if self.train is not None:
            return self.base
        return None if self.tokenizer is None else ModelSettings(model=self.tokenizer)

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        resolved, named = super().resolve(values), values.get("tokenizer")
        return {**resolved, "tokenizer": resolve_model({"model": named})["model"]} if named else resolved

    def templates(self) -> Templates:
        return load_templates(self.prompt_templates)

    def uses(self) -> Sequence[ModelUse]:
        if self.train is None:
            return []
        base, evaluate = self.train.model, self.evaluate
        if not self.trains_policy:
            return [ModelUse("train.model", base, "train")]
        return [
            ModelUse("train.model", base, "train"),
            ModelUse("evaluate.judge", evaluate.judge, "judge", "evaluate.sampling", evaluate.sampling.extra),
            *(
                ModelUse("train.model", base, "generate", f"evaluate.modes.{m.name}.sampling", m.sampling.extra)
                for m in evaluate.modes
            ),
        ]

    def without_effect(self) -> set[str]:
        return set() if self.trains_policy else {f"models.{self.evaluate.judge}"}

    def trained(self) -> dict[str, TrainSettings]:
        """Key that configures a training → its settings."""
        return {} if self.train is None else {"train": self.train}

    def workers(self) -> dict[str, float]:
        return {} if self.train is None else {"train": self.train.num_workers}

    def check(self) -> None:
        super().check()
        self.templates()
        for key, train in self.trained().items():
            try:
                validate_trainer_args(train.method, train.trainer_args)
            except TrainingInputError as error:
                raise ConfigError(f"{key}.{error}") from error
        if self.evaluate.checker is not None:
            require_checker("evaluate.checker", self.evaluate.checker)
        if self.train is None and self.counting is not None:
            try:
                self.counting.check()
            except (EngineStartError, ModelNotFound) as error:
                raise ConfigError(f"tokenizer: {error}") from error

    @model_validator(mode="after")
    def _base_is_trainable(self) -> TrainingConfig:
        if self.train is None:
            return self
        if self.tokenizer is not None:
            raise ValueError(
                "tokenizer has no effect where a policy is trained: rows are counted with the policy's own tokenizer; "
                "remove it, or set train to null"
            )
        for key, value, remedy in (
            ("adapter", self.base.adapter, "merge it into the model first, and set `model` to the merged folder"),
            (
                "chat_template",
                self.base.chat_template,
                "save it with the model's tokenizer (chat_template.jinja in its folder)",
            ),
            ("args.tokenizer", self.base.args.get("tokenizer"), "save it in the model's folder"),
        ):
            if value is not None:
                raise ValueError(
                    f"models.{self.train.model}.{key}: training would start from the model without it, so the policy "
                    f"would differ from the model that generates; {remedy}"
                )
        self.check_kinds()
        for key, train in self.trained().items():
            if not method_of(train.method).trains_policy and not self.takes_reward_models:
                raise ValueError(
                    f"{key}: method {train.method} trains a reward model, which has no answers to compare; use "
                    "`quorum run train` or `quorum run dmapo`, or choose a method that trains a policy"
                )
        return self

    def remarks(self) -> list[str]:
        return [*super().remarks(), *self._idle_keys(), *self._unchecked()]

    def _unchecked(self) -> Iterator[str]:
        checker = default_checker(source.label_in_tables for source in self.prompt_settings.sources)
        if self.evaluate.checker is None and checker is not None:
            try:
                check_checker(checker)
            except CheckersMissing as error:
                yield f"responses will not be compared with the truth: {error}"

    def _idle_keys(self) -> Iterator[str]:
        without_policy = {"checker", "bootstrap_draws", "seed"}
        idle = [] if self.trains_policy else sorted(self.evaluate.model_fields_set - without_policy)
        if idle:
            keys = ", ".join(f"evaluate.{key}" for key in idle)
            why = "train is null" if self.train is None else f"train.method is {self.train.method}"
            yield f"no effect where {why} (there is no policy to evaluate): {keys}"

    def check_kinds(self) -> None:
        """Raises ValueError if training or perplexity needs a kind of rows that is not made."""
        assert self.train is not None
        method, kind = method_of(self.train.method), method_of(self.train.method).data
        if method.weighted and not self.datasets.weights:
            raise ValueError(f"train.method {self.train.method} reads weights of rows; set datasets.weights to true")
        if kind not in self.datasets.kinds:
            raise ValueError(f"train.method is {self.train.method}, but datasets.kinds does not include {kind}")
        if self.trains_policy and self.evaluate.perplexity and "kto" not in self.datasets.kinds:
            raise ValueError(
                "evaluate.perplexity reads the held-out kto rows; add kto to datasets.kinds or set it to false"
            )

    if TYPE_CHECKING:

        def report(self) -> ReportSettings:
            """The facts of the report that are in no table."""
            ...

    def page(self) -> Settings:
        return self.report()

    def report_stage(self, stages: Sequence[Stage]) -> Stage:
        """The page of these stages, and of the checklists and open labels that they read."""
        read = [parent for stage in stages for parent in stage.inputs.values()]
        more = [parent for parent in read if parent.role_name in ("checklists", "levels")]
        stages = [*stages, *{stage.name: stage for stage in more}.values()]
        base = self.base if self.trains_policy else None
        return evaluate(self.evaluate, self.report(), base, self.datasets.max_length, stages)

    def report_of(
        self, judging: Mapping[str, str], recorded: Mapping[str, str] | None = None, **fields: object
    ) -> ReportSettings:
        """The facts of a report that are in no table.

        Args:
            judging: judge of the training data → its key under `models`.
            recorded: judge of the training data → its program, or the file or dataset that has its verdicts.
            fields: further fields of ReportSettings.
        """
        values: dict[str, object] = {
            "run_name": self.run.name,
            "config_digest": digest(self.model_dump(mode="json", exclude={"run", "calls", "ray"}), size=8),
            "models": {key: model.shown for key, model in self.models.items()},
            "curating": {name: self.models[key].shown for name, key in judging.items()} | dict(recorded or {}),
            "checker": self.evaluate.checker,
            "bootstrap_draws": self.evaluate.bootstrap_draws,
            "seed": self.evaluate.seed,
        }
        used = dict.fromkeys([*judging.values(), *([self.evaluate.judge] if self.trains_policy else [])])
        cards: dict[str, list[dict[str, Any]]] = {}
        for key in used:
            with contextlib.suppress(CardError):  # the checks before a run name it; a stored run needs no card
                cards[key] = cards_of(f"models.{key}", self.models[key])
        values["cards"] = {key: judges for key, judges in cards.items() if judges}
        if self.trains_policy:
            values |= {
                "evaluating": {self.evaluate.judge: self.models[self.evaluate.judge].shown},
                "candidate": self.base.shown,
            }
        return ReportSettings.model_validate({**values, **fields})


def _block(values: Any, name: str) -> Mapping[str, Any] | None:
    """A block of unchecked values; None where there is none."""
    block = values.get(name) if isinstance(values, Mapping) else None
    return block if isinstance(block, Mapping) else None


def rubric_models(judge: JudgeSettings) -> dict[str, str]:
    """Judge that is a model → the model's key."""
    return {rubric.name: rubric.model or judge.model for rubric in judge.rubrics} | {
        r.name: r.model for r in judge.rewards
    }


def given_items(judge: JudgeSettings) -> dict[str, list[str]]:
    """Judge with a checklist that is given → the texts of its items."""
    return {rubric.name: [item.text for item in rubric.items] for rubric in judge.rubrics if rubric.items}


def require_checker(key: str, checker: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError if the checker of this key cannot run here."""
    try:
        check_checker(checker, options)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def recorded_judges(judge: JudgeSettings) -> dict[str, str]:
    """Judge that calls no model → its program's name, or the file that has its verdicts."""
    programs = {program.name: f"program {os.path.basename(program.checker)}" for program in judge.programs}
    return programs | ({} if judge.source is None else dict.fromkeys(judge.source.judges, judge.source.default_label))


def rubric_uses(judge: JudgeSettings) -> Iterator[ModelUse]:
    """The keys of the `judge` block that choose a model."""
    for rubric in judge.rubrics:
        key, model = f"judge.rubrics.{rubric.name}", rubric.model or judge.model
        yield from judge_uses(key, model, {"judge.sampling": judge.sampling}, rubric.sampling)
        if rubric.checklist is not None:
            yield ModelUse(f"{key}.checklist.model", rubric.checklist.model, "judge", f"{key}.checklist", {})
    for reward in judge.rewards:
        yield ModelUse(f"judge.rewards.{reward.name}.model", reward.model, "reward")

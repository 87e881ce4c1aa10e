"""The keys and checks of workflows that make preference data and train a policy on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, model_validator

from ray_pipeline.agents.templates import Templates, load_templates
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.models import ModelSettings, ModelUse
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.store.keys import digest
from ray_pipeline.training.methods import TrainingInputError, method_of, validate_trainer_args
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.config import RunConfig


class TrainingConfig(RunConfig):
    """The keys of such a workflow, beside those shared by all workflows."""

    prompt_templates: str = Field("default", description="built-in name or YAML file of the agents' prompts")
    prompts: PromptsConfig = PromptsConfig()
    datasets: DatasetsConfig = DatasetsConfig()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards

    @property
    def base(self) -> ModelSettings:
        """The model that training starts from."""
        return self.models[self.train.model]

    def templates(self) -> Templates:
        return load_templates(self.prompt_templates)

    def uses(self) -> Sequence[ModelUse]:
        base, evaluate = self.train.model, self.evaluate
        return [
            ModelUse("train.model", base, "train"),
            ModelUse("evaluate.judge", evaluate.judge, "judge", "evaluate.sampling", evaluate.sampling.extra),
            *(
                ModelUse(
                    "train.model", self.train.model, "generate", f"evaluate.modes.{m.name}.sampling", m.sampling.extra
                )
                for m in evaluate.modes
            ),
        ]

    def trained(self) -> dict[str, TrainSettings]:
        """Key that configures a training → its settings."""
        return {"train": self.train}

    def workers(self) -> dict[str, float]:
        return {"train": self.train.num_workers}

    def check(self) -> None:
        super().check()
        self.templates()
        for key, train in self.trained().items():
            try:
                validate_trainer_args(train.method, train.trainer_args)
            except TrainingInputError as error:
                raise ConfigError(f"{key}.{error}") from error

    @model_validator(mode="after")
    def _base_is_trainable(self) -> TrainingConfig:
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
        return self

    def check_kinds(self) -> None:
        """Raises ValueError if training or perplexity needs a kind of rows that is not made."""
        kind = method_of(self.train.method).data
        if kind not in self.datasets.kinds:
            raise ValueError(f"train.method is {self.train.method}, but datasets.kinds does not include {kind}")
        if self.evaluate.perplexity and "kto" not in self.datasets.kinds:
            raise ValueError(
                "evaluate.perplexity reads the held-out kto rows; add kto to datasets.kinds or set it to false"
            )

    def report_of(self, judging: Mapping[str, str], **fields: object) -> ReportSettings:
        """The facts of a report that are in no table.

        Args:
            judging: judge of the training data → its key under `models`.
            fields: further fields of ReportSettings.
        """
        values = {
            "run_name": self.run.name,
            "config_digest": digest(self.model_dump(mode="json", exclude={"run", "calls", "ray"}), size=8),
            "models": {key: model.shown for key, model in self.models.items()},
            "curating": {name: self.models[key].shown for name, key in judging.items()},
            "evaluating": {self.evaluate.judge: self.models[self.evaluate.judge].shown},
            "candidate": self.base.shown,
            "checker": self.evaluate.checker,
            "bootstrap_draws": self.evaluate.bootstrap_draws,
            "seed": self.evaluate.seed,
        }
        return ReportSettings.model_validate({**values, **fields})


def rubric_models(judge: JudgeSettings) -> dict[str, str]:
    """Rubric judge → the key of its model."""
    return {rubric.name: rubric.model or judge.model for rubric in judge.rubrics}


def rubric_uses(judge: JudgeSettings) -> Iterator[ModelUse]:
    """The keys of the `judge` block that choose a model."""
    for rubric in judge.rubrics:
        where, model = f"judge.rubrics.{rubric.name}", rubric.model or judge.model
        yield ModelUse(f"{where}.model", model, "judge", "judge.sampling", judge.sampling.extra)
        if rubric.sampling:
            yield ModelUse(f"{where}.model", model, "judge", f"{where}.sampling", rubric.sampling.extra)

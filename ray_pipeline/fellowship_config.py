"""What `quorum run fellowship` reads."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ray_pipeline.agents.templates import Templates, load_templates
from ray_pipeline.config import (
    CallsBlock,
    ConfigError,
    RayBlock,
    RunBlock,
    check_kinds,
    check_models,
    check_sampling,
    check_trainable,
)
from ray_pipeline.data.datasets import DatasetsConfig
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.feedback.improve import ImproveSettings
from ray_pipeline.feedback.loop import LoopSettings
from ray_pipeline.feedback.select import SelectSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.policy.train import TrainSettings
from ray_pipeline.store.keys import digest
from ray_pipeline.store.settings import Settings
from ray_pipeline.training.methods import validate_trainer_args
from ray_pipeline.training.spec import TrainingInputError

#: Stages that leave something to report, in the order of the workflow.
STAGES = ("prompts", "candidates", "judge", "datasets", "train", "evaluate")


class FellowshipConfig(Settings):
    """Everything that `quorum run fellowship` reads.

    Attributes:
        prompt_templates: built-in name or YAML file of what rubric judges and the comparing judge are told.
        judge: rubric judges: of the responses where `select` names neither strategy nor debate, and of the evaluation.
        improve: the second kind of data sets; none: they are not made.
    """

    run: RunBlock = RunBlock(name="fellowship")
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ModelSettings]
    prompt_templates: str = "default"
    prompts: PromptsConfig = PromptsConfig()
    loop: LoopSettings = LoopSettings()
    judge: JudgeSettings | None = None
    select: SelectSettings = SelectSettings()
    datasets: DatasetsConfig = DatasetsConfig(min_gap=0.0)
    improve: ImproveSettings | None = None
    train: TrainSettings = TrainSettings(method="dpo", model="generator")
    evaluate: EvaluateSettings = EvaluateSettings()
    failure: FailureSettings = FailureSettings()
    calls: CallsBlock = CallsBlock()
    ray: RayBlock = RayBlock()

    @model_validator(mode="after")
    def _consistent(self) -> FellowshipConfig:
        wanted = {
            "loop.generator": self.loop.generator,
            **{f"loop.reviewers.{r.name}.model": r.model for r in self.loop.reviewers},
            **{f"select.judges.{j.name}.model": j.model for j in self.select.judges},
            "train.model": self.train.model,
            "evaluate.judge": self.evaluate.judge,
        }
        if self.judge is not None:
            wanted |= {f"judge.rubrics.{r.name}.model": r.model or self.judge.model for r in self.judge.rubrics}
        for key, model in wanted.items():
            if model not in self.models:
                known = ", ".join(self.models) or "none"
                raise ValueError(f"{key} is {model!r}, and models has no such key; there are {known}")
        if idle := sorted(set(self.models) - set(wanted.values())):
            raise ValueError(f"models.{idle[0]} is read by no stage; remove it, or name it where a model is chosen")
        if self.judge is None and not self.select.compares:
            raise ValueError(
                "nobody judges the responses: give a judge block with rubrics, or select.strategy and judges"
            )
        try:
            self.select.jury.check(self.judges)
        except ValueError as error:
            raise ValueError(f"select.jury.{error}") from error
        if self.loop.responses < 2:
            raise ValueError("loop.responses must be 2 or more: one response alone is neither accepted nor rejected")
        self._check_training()
        return self

    def _check_training(self) -> None:
        for key, model in {"train.model": self.train.model, **self._tokenizers()}.items():
            if not self.models[model].is_here:
                raise ValueError(f"{key} is {model!r}, a model at an endpoint; name a model of engine vllm: {_WHY}")
        check_trainable(self.train, self.models)
        check_kinds(self.train, self.datasets, self.evaluate)
        own = None if self.improve is None else self.improve.prompts
        if own is not None and own.num_shards != self.prompts.num_shards:
            raise ValueError(
                f"improve.prompts.num_shards is {own.num_shards} and prompts.num_shards {self.prompts.num_shards}; "
                "a run has one number of shards"
            )

    def _tokenizers(self) -> dict[str, str]:
        """Models whose rows are counted in tokens beside those of the training."""
        if self.improve is None:
            return {}
        return {"loop.generator": self.loop.generator, "loop.reviewers.0.model": self.loop.reviewers[0].model}

    def templates(self) -> Templates:
        return load_templates(self.prompt_templates)

    @property
    def judges(self) -> list[str]:
        """Names of the judges that select."""
        if self.select.compares:
            return self.select.names
        assert self.judge is not None
        return self.judge.names

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards

    def report(self) -> ReportSettings:
        """What the report says beside the tables."""
        if self.select.compares:
            judging = {j.name: self.models[j.model].model for j in self.select.judges}
        else:
            assert self.judge is not None
            judging = {r.name: self.models[r.model or self.judge.model].model for r in self.judge.rubrics}
        return ReportSettings(
            run_name=self.run.name,
            workflow="fellowship",
            stages=STAGES,
            config_digest=digest(self.model_dump(mode="json", exclude={"run", "calls", "ray"}), size=8),
            models={key: _shown(model.model) for key, model in self.models.items()},
            curating={name: _shown(model) for name, model in judging.items()},
            evaluating={self.evaluate.judge: _shown(self.models[self.evaluate.judge].model)},
            candidate=_shown(self.models[self.train.model].model),
            bootstrap_draws=self.evaluate.bootstrap_draws,
            seed=self.evaluate.seed,
        )

    def page(self) -> ReportSettings:
        """What the last stage's page says beside the tables, kept in the manifest so that it can be written anew."""
        return self.report()

    def origin(self, what: str = "") -> str:
        """How the preferences came about, for the data set cards."""
        judged = ", ".join(self.judges)
        how = f" by {self.select.how}" if self.select.how else ""
        if len(self.judges) > 1:
            how += f" (a jury: {self.select.jury.pool})"
        loop = f"a feedback loop of {self.loop.responses} responses reviewed by {', '.join(self.loop.names)}"
        return f"{what or 'Best of the responses'} of {loop}, judged by {judged}{how}"

    def run_folder(self, run_dir: str | None = None) -> str:
        return self.run.folder(run_dir)

    def calls_root(self, run_folder: str) -> str:
        return self.calls.folder(run_folder)

    def check(self) -> None:
        """What types cannot say. Raises ConfigError or TemplateError."""
        self.templates()
        self.loop.texts()
        if self.select.strategy is not None:
            self.select.texts().of(self.select.strategy)
        if self.select.debate is not None:
            texts = self.select.debate_texts()
            # The second kind of data has more answers to a prompt than the loop.
            if not texts.shows(self.loop.responses if self.improve is None else max(self.loop.responses, 3)):
                raise ConfigError(
                    f"select.debate_templates {self.select.debate_templates} does not show all responses of a prompt; "
                    "name a file whose `shared` goes through `answers`, as default does"
                )
            try:
                self.select.debate.speakers(texts.roles)
            except ValueError as error:
                raise ConfigError(f"select.{error}") from error
        check_models(self.models)
        check_sampling(self.models, self._samplings())
        try:
            validate_trainer_args(self.train.method, self.train.trainer_args)
        except TrainingInputError as error:
            raise ConfigError(f"train.{error}") from error

    def _samplings(self) -> dict[str, tuple[list[str], dict[str, Any]]]:
        """Key of every sampling → the models that it is used on, and its `extra`."""
        loop, select = self.loop, self.select
        found = {
            "loop.sampling": ([loop.generator], loop.sampling.extra),
            "loop.reviewing": (loop.review_models, loop.reviewing.extra),
            "evaluate.sampling": ([self.evaluate.judge], self.evaluate.sampling.extra),
            "select.sampling": (select.models, select.sampling.extra),
        }
        found |= {
            f"evaluate.modes.{m.name}.sampling": ([self.train.model], m.sampling.extra) for m in self.evaluate.modes
        }
        found |= {
            f"loop.reviewers.{r.name}.sampling": ([r.model], r.sampling.extra) for r in loop.reviewers if r.sampling
        }
        found |= {
            f"select.judges.{j.name}.sampling": ([j.model], j.sampling.extra) for j in select.judges if j.sampling
        }
        if select.debate is not None:
            found["select.debate.speech"] = (select.models, select.debate.speech.extra)
        if self.judge is not None:
            found["judge.sampling"] = (self.judge.models, self.judge.sampling.extra)
        if self.improve is not None:
            found["improve.sampling"] = ([loop.generator], self.improve.sampling.extra)
            found["improve.reviewing"] = (loop.review_models, self.improve.reviewing.extra)
        return found


_WHY = "its tokenizer counts the rows' tokens, and what is trained needs weights here"


def _shown(model: str) -> str:
    """A model's name for readers: hub names as they are, folders by their last part."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith("/") else model


#: Workflow → its configuration class.
FELLOWSHIP_CONFIGS: dict[str, type[FellowshipConfig]] = {"fellowship": FellowshipConfig}

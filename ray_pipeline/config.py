"""The configuration of a run: one YAML file, overrides as `key=value`, and errors that name the right key."""

from __future__ import annotations

import difflib
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.templates import TemplateError, Templates, load_templates
from ray_pipeline.engines.base import EngineStartError
from ray_pipeline.engines.identity import ModelNotFound
from ray_pipeline.graph.models import ModelSettings
from ray_pipeline.pocket import model_path
from ray_pipeline.stages.candidates import CandidateSettings
from ray_pipeline.stages.compare import EvaluateSettings
from ray_pipeline.stages.critic import CriticSettings
from ray_pipeline.stages.datasets import DatasetsConfig
from ray_pipeline.stages.evaluate import ReportSettings
from ray_pipeline.stages.gate import GateConfig
from ray_pipeline.stages.judge import FailureSettings, JudgeSettings
from ray_pipeline.stages.prompts import PromptsConfig
from ray_pipeline.stages.train import TrainSettings
from ray_pipeline.store.files import normalise_location
from ray_pipeline.store.keys import digest
from ray_pipeline.store.settings import Settings
from ray_pipeline.training.methods import validate_trainer_args
from ray_pipeline.training.spec import TrainingInputError


class ConfigError(ValueError):
    """The configuration cannot be used. Each line of the message names a key and a remedy."""


class RunBlock(Settings):
    """The `run` block."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    root: str = Field("runs", description="folder of run folders; a path or the URI of any pyarrow filesystem")


class CallsBlock(Settings):
    """The `calls` block: the log of every LLM call."""

    root: str | None = Field(None, description="default: `calls` in the run folder; runs may share one")
    replay_only: bool = Field(False, description="answer from the log alone, and fail where it cannot")


class RayBlock(Settings):
    """The `ray` block: which cluster, and what a local one may use."""

    address: str | None = Field(None, description="default: RAY_ADDRESS, or a cluster of our own on this machine")
    num_cpus: int | None = Field(None, ge=1)
    num_gpus: int | None = Field(None, ge=0)
    object_store_memory: int | None = Field(None, ge=80_000_000, description="bytes")

    def arguments(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_dump().items() if v is not None}


class DmapoConfig(Settings):
    """Everything that `quorum run dmapo` reads."""

    run: RunBlock = RunBlock()
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ModelSettings]
    prompt_templates: str = Field("default", description="built-in name or YAML file of what the agents say")
    prompts: PromptsConfig = PromptsConfig()
    candidates: CandidateSettings = CandidateSettings()
    judge: JudgeSettings
    critic: CriticSettings = CriticSettings()
    gate: GateConfig = GateConfig()
    datasets: DatasetsConfig = DatasetsConfig()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    failure: FailureSettings = FailureSettings()
    calls: CallsBlock = CallsBlock()
    ray: RayBlock = RayBlock()

    @model_validator(mode="after")
    def _consistent(self) -> DmapoConfig:
        wanted = {
            "candidates.model": self.candidates.model,
            "critic.model": self.critic.model,
            "train.model": self.train.model,
            "evaluate.judge": self.evaluate.judge,
            **{f"judge.rubrics.{r.name}.model": r.model or self.judge.model for r in self.judge.rubrics},
        }
        for key, model in wanted.items():
            if model not in self.models:
                raise ValueError(f"{key} is {model!r}, and models has no such key{_nearest(model, self.models)}")
        idle = sorted(set(self.models) - set(wanted.values()))
        if idle:
            raise ValueError(f"models.{idle[0]} is read by no stage; remove it, or name it where a model is chosen")
        if not self.models[self.train.model].is_here:
            raise ValueError(
                f"train.model is {self.train.model!r}, a model at an endpoint; what is trained needs weights here: "
                "name a model of engine vllm"
            )
        if self.train.method not in self.datasets.kinds:
            raise ValueError(
                f"train.method is {self.train.method}, and datasets.kinds does not make {self.train.method}"
            )
        if self.evaluate.perplexity and "kto" not in self.datasets.kinds:
            raise ValueError(
                "evaluate.perplexity reads the held-out kto rows; add kto to datasets.kinds or turn it off"
            )
        return self

    def templates(self) -> Templates:
        return load_templates(self.prompt_templates)

    def report(self) -> ReportSettings:
        """What the report says beside the tables."""
        judges = {r.name: self.models[r.model or self.judge.model].model for r in self.judge.rubrics}
        comparing = self.models[self.evaluate.judge].model
        names = {key: _shown(model.model) for key, model in self.models.items()}
        return ReportSettings(
            run_name=self.run.name,
            config_digest=digest(self.model_dump(mode="json", exclude={"run", "calls", "ray"}), size=8),
            models=names,
            curating={name: _shown(model) for name, model in judges.items()},
            evaluating={self.evaluate.judge: _shown(comparing)},
            gate=self.gate,
            bootstrap_draws=self.evaluate.bootstrap_draws,
            seed=self.evaluate.seed,
        )

    def run_folder(self, run_dir: str | None = None) -> str:
        return normalise_location(run_dir or f"{self.run.root.rstrip('/')}/{self.run.name}")

    def calls_root(self, run_folder: str) -> str:
        return normalise_location(self.calls.root or f"{run_folder}/calls")


#: DAG name → its configuration class.
CONFIGS: dict[str, type[DmapoConfig]] = {"dmapo": DmapoConfig}


def load_config(dag: str, name_or_path: str, overrides: Sequence[str] = ()) -> DmapoConfig:
    """Read a configuration and check everything that can be checked before a stage starts.

    Args:
        name_or_path: a YAML file, or the name of one that comes with Quorum (`pocket`, `configs/pocket.yaml`).
        overrides: `key=value`, with dots for nesting (`gate.tau=2`) and YAML values; list items by number.

    Raises:
        ConfigError: no such file, not YAML, an unknown or unread key, a wrong type, a model that does not exist.
    """
    values = _read_yaml(name_or_path)
    for override in overrides:
        _apply(values, override)
    kind = CONFIGS[dag]
    try:
        config = kind.model_validate(_resolve(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, name_or_path)) from error
    _check(config)
    return config


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    if os.path.isfile(name_or_path):
        try:
            with open(name_or_path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name_or_path} cannot be read: {error}") from error
    else:
        folder = importlib.resources.files("configs")
        name = os.path.basename(name_or_path).removesuffix(".yaml") + ".yaml"
        # A path that leads nowhere is a mistake, whatever it ends with.
        if os.path.dirname(name_or_path) not in ("", "configs") or not (folder / name).is_file():
            known = sorted(f.name for f in folder.iterdir() if f.name.endswith(".yaml"))
            raise ConfigError(f"there is no config file {name_or_path}; Quorum comes with {', '.join(known)}")
        text = (folder / name).read_text("utf-8")
    try:
        values = yaml.load(text, _OneOfEachKey)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path} must be a mapping of blocks, not {type(values).__name__}")
    return values


class _OneOfEachKey(yaml.SafeLoader):
    """YAML as usual, but a key that is written twice is an error: the first block would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"an override is key=value (for example gate.tau=2), not {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value ({error})") from error
    place: Any = values
    *path, last = key.split(".")
    for step in path:
        if isinstance(place, list):
            place = place[_index(place, step, key)]
        else:
            place = place.setdefault(step, {})
            if place is None:
                raise ConfigError(f"{key}: {step} is empty in the file; write it out there")
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"{key}: {step} is a value, not a block")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _index(place: list[Any], step: str, key: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise ConfigError(f"{key}: {step!r} is no item of a list of {len(place)} (the first is 0)")
    return int(step)


def _resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the folders of the pocket models in place of their names."""
    resolved = dict(values)
    models = resolved.get("models")
    if isinstance(models, Mapping):
        resolved["models"] = {key: _resolve_model(model) for key, model in models.items()}
    return resolved


def _resolve_model(model: Any) -> Any:
    if not isinstance(model, Mapping) or not isinstance(model.get("model"), str):
        return model
    if model.get("engine") == "openai":  # its name is the endpoint's word, whatever lies in this folder
        return model
    name = model["model"]
    if name.startswith("pocket:"):
        try:
            return {**model, "model": model_path(name)}
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
    # Actors have another working folder, so paths are made absolute here; a hub name is `owner/name` and stays.
    paths = {key: model[key] for key in ("model", "adapter", "chat_template") if isinstance(model.get(key), str)}
    paths = {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items()}
    return {**model, **{key: path for key, path in paths.items() if os.path.exists(path)}}


def _shown(model: str) -> str:
    """A model's name for readers: hub names as they are, folders by their last part."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model


def _explain(error: ValidationError, kind: type[BaseModel], file: str) -> str:
    lines = []
    for problem in error.errors():
        where = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
        key = ".".join(str(part) for part in where)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: there is no such key{_nearest(str(where[-1]), _fields_at(kind, where[:-1]))}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            shown = f" (it is {given!r})" if isinstance(given, (str, int, float, bool)) else ""
            lines.append(f"{key}: {message}{shown}" if key else message)
    return f"{file}: " + "; ".join(lines)


def _fields_at(kind: Any, where: Sequence[Any]) -> list[str]:
    """Names of the keys at a place of the configuration, as far as its types tell."""
    types = [kind]
    for part in where:
        found: list[Any] = []
        for one in types:
            for model in _models_in(one):
                if isinstance(part, str) and part in model.model_fields:
                    found.append(model.model_fields[part].annotation)
                elif isinstance(part, str) and part == getattr(model.model_fields.get("type"), "default", None):
                    found.append(model)
            if not isinstance(one, type) or not issubclass(one, BaseModel):
                found += [a for a in get_args(one) if isinstance(part, int) or a is not str]
        types = found or types
    return sorted({name for one in types for model in _models_in(one) for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Model classes inside an annotation such as `tuple[Rubric, ...]` or `A | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _nearest(name: str, known: Any) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""


def _check(config: DmapoConfig) -> None:
    """What types cannot say: names that other libraries know, files, and models that must exist."""
    try:
        config.templates()
        for key, model in config.models.items():
            if model.chat_template is not None and not os.path.isfile(model.chat_template):
                raise ConfigError(f"models.{key}.chat_template: there is no file {model.chat_template}")
            try:
                model.check()
            except (EngineStartError, ModelNotFound) as error:
                raise ConfigError(f"models.{key}: {error}") from error
        for key, (models, extra) in _samplings(config).items():
            for name in models:
                try:
                    config.models[name].check_extra(extra)
                except EngineStartError as error:
                    raise ConfigError(f"{key}.extra: {error}") from error
        validate_trainer_args(config.train.method, config.train.trainer_args)
    except (TemplateError, TrainingInputError) as error:
        raise ConfigError(str(error)) from error


def _samplings(config: DmapoConfig) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Key of every sampling → the models that it is used on, and its `extra`."""
    answering, judge = [config.train.model], config.judge
    found = {
        "candidates.sampling": ([config.candidates.model], config.candidates.sampling.extra),
        "judge.sampling": (judge.models, judge.sampling.extra),
        "critic.sampling": ([config.critic.model], config.critic.sampling.extra),
        "evaluate.sampling": ([config.evaluate.judge], config.evaluate.sampling.extra),
    }
    found |= {f"evaluate.modes.{m.name}.sampling": (answering, m.sampling.extra) for m in config.evaluate.modes}
    found |= {
        f"judge.rubrics.{r.name}.sampling": ([r.model or judge.model], r.sampling.extra)
        for r in judge.rubrics
        if r.sampling
    }
    return found


__all__ = ["CONFIGS", "ConfigError", "DmapoConfig", "Rubric", "load_config"]

"""The configuration of a run: one YAML file, overrides as `key=value`, and errors that name the right key."""

from __future__ import annotations

import copy
import difflib
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.templates import TemplateError, Templates, load_templates
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.questions import BenchmarksSettings
from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model
from ray_pipeline.bench.stages import benchmark_samplings, check_benchmarks
from ray_pipeline.data.candidates import CandidateSettings
from ray_pipeline.data.critic import CriticSettings
from ray_pipeline.data.datasets import DatasetsConfig
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.imported import PreferenceSource, tables_of
from ray_pipeline.data.judging import JudgeSettings
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import InputError
from ray_pipeline.engines.base import EngineStartError
from ray_pipeline.engines.identity import ModelNotFound
from ray_pipeline.engines.models import ModelSettings, Room
from ray_pipeline.evaluate.method_table import PolicyName, TableSettings
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.pocket import model_path
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.policy.train import TrainSettings
from ray_pipeline.store.files import join, normalise_location
from ray_pipeline.store.keys import digest
from ray_pipeline.store.settings import Settings
from ray_pipeline.training.methods import METHODS, validate_trainer_args
from ray_pipeline.training.spec import MethodName, TrainingInputError


class ConfigError(ValueError):
    """The configuration cannot be used. Each line of the message names a key and a remedy."""


class RunBlock(Settings):
    """The `run` block."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    root: str = Field("runs", description="folder of run folders; a path or the URI of any pyarrow filesystem")

    def folder(self, run_dir: str | None = None) -> str:
        """The run folder: what `--run-dir` says, or the run's name below the root."""
        return normalise_location(run_dir or join(self.root, self.name))


class CallsBlock(Settings):
    """The `calls` block: the log of every LLM call."""

    root: str | None = Field(None, description="default: `calls` in the run folder; runs may share one")
    replay_only: bool = Field(False, description="answer from the log alone, and fail where it cannot")

    def folder(self, run_folder: str) -> str:
        """Where the call log lies."""
        return normalise_location(self.root or join(run_folder, "calls"))


class RayBlock(Settings):
    """The `ray` block: which cluster, and what a local one may use."""

    address: str | None = Field(None, description="default: RAY_ADDRESS, or a cluster of our own on this machine")
    num_cpus: int | None = Field(None, ge=1)
    num_gpus: int | None = Field(None, ge=0)
    object_store_memory: int | None = Field(None, ge=80_000_000, description="bytes")
    max_stages: int | None = Field(
        None, ge=1, description="stages at work at once; default: all whose inputs are there (set it without GPUs)"
    )
    tables: Room = Field(Room(), description="where tables without an engine are made, a shard a task of one CPU")

    def arguments(self) -> dict[str, Any]:
        """What `ray.init` takes."""
        return {k: v for k, v in self.model_dump(exclude={"max_stages", "tables"}).items() if v is not None}


def check_trainable(train: TrainSettings, models: Mapping[str, ModelSettings]) -> None:
    """Raises ValueError where the model that is trained would be another one than the model that answers."""
    base = models.get(train.model)
    if base is None:
        return
    for key, value, remedy in (
        ("adapter", base.adapter, "merge it into the model first, and name the merged folder"),
        (
            "chat_template",
            base.chat_template,
            "save it with the model's tokenizer (chat_template.jinja in its folder)",
        ),
        ("args.tokenizer", base.args.get("tokenizer"), "save it in the model's folder"),
    ):
        if value is not None:
            raise ValueError(
                f"models.{train.model}.{key}: training starts from the model without it, which is another one than "
                f"the run asks; {remedy}"
            )


def check_kinds(train: TrainSettings, datasets: DatasetsConfig, evaluate: EvaluateSettings) -> None:
    """Raises ValueError when training or perplexity reads a kind of rows that is not made."""
    kind = METHODS[train.method].data
    if kind not in datasets.kinds:
        raise ValueError(f"train.method is {train.method}, and datasets.kinds does not make {kind}")
    if evaluate.perplexity and "kto" not in datasets.kinds:
        raise ValueError("evaluate.perplexity reads the held-out kto rows; add kto to datasets.kinds or turn it off")


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
    benchmarks: BenchmarksSettings | None = Field(
        None, description="public benchmarks as the last stage; default: none"
    )
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
        if self.benchmarks is not None:
            wanted |= {f"benchmarks: the judge {key}": key for key in self.benchmarks.judges}
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
        check_trainable(self.train, self.models)
        self._check_training()
        mt = self.benchmarks.mt_bench if self.benchmarks is not None else None
        if mt is not None and "pairwise" in mt.modes and mt.against not in ("base", *self.policy_labels()):
            raise ValueError(
                f"benchmarks.mt_bench.against is {mt.against!r}; there are base, {', '.join(self.policy_labels())}"
            )
        return self

    def policy_labels(self) -> list[str]:
        """What the policies of this run are called in tables."""
        return ["policy"]

    def benchmarks_page(self) -> BenchmarksPage:
        """What the page of the public benchmarks says beside the tables."""
        assert self.benchmarks is not None
        base, curating = self.models[self.train.model], tuple(sorted(set(self.report().curating.values())))
        shown = _shown(base.model)
        judges = {key: self.models[key] for key in self.benchmarks.judges}
        return BenchmarksPage(
            run_name=self.run.name,
            benchmarks=self.benchmarks,
            models={
                "base": MeasuredModel(shown=shown, identity="+".join(base.weights().values())),
                **{label: MeasuredModel(shown=shown, curating=curating) for label in self.policy_labels()},
            },
            judges={key: judging_model(model, _shown(model.model)) for key, model in judges.items()},
        )

    def _check_training(self) -> None:
        check_kinds(self.train, self.datasets, self.evaluate)

    def trained(self) -> dict[str, TrainSettings]:
        """Where a training is configured → its settings."""
        return {"train": self.train}

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
            candidate=_shown(self.models[self.train.model].model),
            gate=self.gate,
            bootstrap_draws=self.evaluate.bootstrap_draws,
            seed=self.evaluate.seed,
        )

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards

    def page(self) -> ReportSettings | TableSettings:
        """What the last stage's page says beside the tables, kept in the manifest so that it can be written anew."""
        return self.report()

    def run_folder(self, run_dir: str | None = None) -> str:
        return self.run.folder(run_dir)

    def calls_root(self, run_folder: str) -> str:
        return self.calls.folder(run_folder)


def served_models(config: Any) -> dict[str, ModelSettings]:
    """Every model of any workflow's configuration by its name: a mapping, or the measured list and the judges of
    benchmarks."""
    models = getattr(config, "models", None) or {}
    if isinstance(models, Mapping):
        return dict(models)
    return {candidate.name: candidate.settings for candidate in models} | dict(config.judges)


class DataVariant(Settings):
    """One way of making training data: from the run's candidates and scores, or from somebody else's rows.

    Attributes:
        gated: the confidence gate decides. False: best and worst of k by the mean score, whatever it is.
        gate: changes of the `gate` block ({use_variance: false}, {use_critic: false}, {tau: 1}).
        judges: whose scores count; default: all.
        k: only the first so many candidates of each prompt; default: all.
        min_gap: smallest gap of a pair's scores; default: datasets.min_gap with the gate, any gap above 0 without.
        source: training rows of a hub data set or of files; nothing above applies to them.
    """

    gated: bool = True
    gate: dict[str, Any] = Field(default_factory=dict)
    judges: tuple[str, ...] | None = Field(None, min_length=1)
    k: int | None = Field(None, ge=2)
    min_gap: float | None = Field(None, ge=0)
    source: PreferenceSource | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DataVariant:
        set_here = sorted(self.model_fields_set - {"source"})
        if self.source is not None and set_here:
            raise ValueError(f"{set_here[0]} is read by nothing: rows of a source were judged by somebody else")
        if not self.gated and self.gate:
            raise ValueError("gate is read by nothing where gated is false")
        return self


class BaselinesBlock(Settings):
    """The `baselines` block: every method is trained on every data set with every seed."""

    methods: dict[MethodName, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict[str, Any]() for name in METHODS},
        min_length=1,
        description="method → changes of the `train` block for it",
    )
    data: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], DataVariant] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """A plain list of methods changes nothing for any of them."""
        return {name: {} for name in given} if isinstance(given, (list, tuple)) else given


class BaselinesConfig(DmapoConfig):
    """Everything that `quorum run baselines` reads: a DMAPO configuration and what to compare."""

    baselines: BaselinesBlock

    def _check_training(self) -> None:
        """What the block of one training would say is said by `baselines`."""
        for name, block, keys, instead in (
            ("train", self.train, ("method", "seed"), "baselines.methods and baselines.seeds say it"),
            ("datasets", self.datasets, ("kinds", "seed"), "it follows from baselines.methods and baselines.seeds"),
            ("evaluate", self.evaluate, ("perplexity", "perplexity_rows", "skip_generation"), "remove it"),
        ):
            for key in keys:
                if key in block.model_fields_set:
                    raise ValueError(f"{name}.{key} is read by nothing in a comparison: {instead}")
        if len(set(self.baselines.seeds)) < len(self.baselines.seeds):
            raise ValueError(f"baselines.seeds names a seed twice: {list(self.baselines.seeds)}")
        for name, variant in self.baselines.data.items():
            strangers = [judge for judge in variant.judges or () if judge not in self.judge.names]
            if strangers:
                near = _nearest(strangers[0], self.judge.names)
                raise ValueError(f"baselines.data.{name}.judges names {strangers[0]!r}, which is no rubric{near}")
            if variant.k is not None and variant.k > self.candidates.k:
                raise ValueError(f"baselines.data.{name}.k is {variant.k}, and candidates.k only {self.candidates.k}")
            try:
                self.gate_of(variant)
                if variant.source is not None:
                    tables_of(variant.source.format, self.rows_of(variant))
            except (ValidationError, InputError) as error:
                raise ValueError(f"baselines.data.{name}: {_first_problem(error)}") from error
        for name in self.baselines.methods:
            try:
                self.training(name, 0)
            except ValidationError as error:
                raise ValueError(f"baselines.methods.{name}: {_first_problem(error)}") from error

    def trained(self) -> dict[str, TrainSettings]:
        return {f"baselines.methods.{name}": self.training(name, 0) for name in self.baselines.methods}

    def training(self, method: MethodName, seed: int) -> TrainSettings:
        """The `train` block with the changes of a method."""
        shared = self.train.model_dump(exclude_unset=True)
        return TrainSettings.model_validate(
            {**shared, **self.baselines.methods[method], "method": method, "seed": seed}
        )

    def gate_of(self, variant: DataVariant) -> GateConfig | None:
        """The gate of a data set; None where none decides."""
        if not variant.gated or variant.source is not None:
            return None
        return GateConfig.model_validate({**self.gate.model_dump(), **variant.gate})

    def rows_of(self, variant: DataVariant, seed: int = 0) -> DatasetsConfig:
        """The `datasets` block of a data set: the kinds that the methods need, in the order of a seed."""
        kinds = list(dict.fromkeys(METHODS[name].data for name in self.baselines.methods))
        gap = variant.min_gap if variant.min_gap is not None else self.datasets.min_gap if variant.gated else 0.0
        return self.datasets.model_copy(update={"kinds": kinds, "seed": seed, "min_gap": gap})

    def policies(self) -> list[PolicyName]:
        """Every policy that is trained, data set by data set and seed by seed."""
        compared = self.baselines
        return [
            PolicyName(label=f"{method}-{data}-s{seed}", method=method, data=data, seed=seed)
            for data in compared.data
            for seed in compared.seeds
            for method in compared.methods
        ]

    def policy_labels(self) -> list[str]:
        return [policy.label for policy in self.policies()]

    def page(self) -> TableSettings:
        shown = self.report()
        data = self.baselines.data
        judge = _shown(self.models[self.evaluate.judge].model)
        return TableSettings(
            run_name=self.run.name,
            policies=tuple(self.policies()),
            mode=self.evaluate.modes[0].name,
            over=next((name for name, variant in data.items() if not variant.gated), next(iter(data))),
            data={name: self.how(variant) for name, variant in data.items()},
            facts={
                "base": _shown(self.models[self.train.model].model),
                "comparing judge": f"{self.evaluate.judge} ({judge}), both orders, mode {self.evaluate.modes[0].name}",
                "rubric judges": ", ".join(f"{name} ({model})" for name, model in shown.curating.items()),
                **self._published(),
                "seeds": ", ".join(map(str, self.baselines.seeds)),
                "training": ", ".join(f"{k} {v}" for k, v in self.train.model_dump(exclude_unset=True).items()),
                "per method": "; ".join(f"{k}: {v}" for k, v in self.baselines.methods.items() if v) or "nothing",
            },
            curating=shown.curating if any(v.source is None for v in data.values()) else {},
            evaluating=shown.evaluating,
            bootstrap_draws=self.evaluate.bootstrap_draws,
            seed=self.evaluate.seed,
        )

    def _published(self) -> dict[str, str]:
        """Which line of the table is the method of the paper, where there is one."""
        whole = [name for name, variant in self.baselines.data.items() if variant == DataVariant()]
        return {"DMAPO": f"kto on {whole[0]}"} if whole and "kto" in self.baselines.methods else {}

    def how(self, variant: DataVariant) -> str:
        if variant.source is not None:
            place = variant.source.name if variant.source.type == "huggingface" else variant.source.path
            return f"{variant.source.format} rows of {place}"
        judges, k = ", ".join(variant.judges or self.judge.names), variant.k or self.candidates.k
        if not variant.gated:
            return f"best and worst of {k} by {judges}; no gate"
        gate = self.gate_of(variant)
        assert gate is not None
        rules = [f"tau {gate.tau:g}" if gate.use_variance else "no variance rule"]
        rules.append(f"alpha {gate.alpha:g}" if gate.use_critic else "no critic")
        return f"gate on {k} candidates by {judges}; {', '.join(rules)}"


def _first_problem(error: ValidationError | InputError) -> str:
    if isinstance(error, InputError):
        return str(error)
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such key"
    return f"{where}: {message}" if where else message


#: DAG name → its configuration class.
CONFIGS: dict[str, type[DmapoConfig]] = {"dmapo": DmapoConfig, "baselines": BaselinesConfig}


def load_config(dag: str, name_or_path: str, overrides: Sequence[str] = (), kind: type[Any] | None = None) -> Any:
    """Read a configuration and check everything that can be checked before a stage starts.

    Args:
        name_or_path: a YAML file, or the name of one that comes with Quorum (`pocket`, `configs/pocket.yaml`).
        overrides: `key=value`, with dots for nesting (`gate.tau=2`) and YAML values; list items by number.
        kind: the class of the configuration; default: that of the workflow in CONFIGS. One that is not in CONFIGS
            checks itself by its method `check`.

    Raises:
        ConfigError: no such file, not YAML, an unknown or unread key, a wrong type, a model that does not exist.
    """
    values = _read_yaml(name_or_path)
    for override in overrides:
        _apply(values, override)
    kind = CONFIGS[dag] if kind is None else kind
    try:
        config = kind.model_validate(_resolve(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, name_or_path)) from error
    try:
        if isinstance(config, DmapoConfig):
            _check(config)
        else:
            config.check()
    except TemplateError as error:
        raise ConfigError(str(error)) from error
    return config


def read_config(
    dag: str,
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    source: str = "config",
    kind: type[Any] | None = None,
) -> Any:
    """A configuration from plain data, of a run that was checked when it began: types and keys alone are checked here,
    so that neither weights nor trainers are needed.

    Args:
        values: what `config.yaml` of a run folder holds.
        source: named in errors.
        kind: the class of the configuration; default: that of the workflow in CONFIGS.

    Raises:
        ConfigError: as `load_config`, or the workflow is not in CONFIGS and no `kind` is given.
    """
    kind = CONFIGS.get(dag) if kind is None else kind
    if kind is None:
        raise ConfigError(f"{source}: {dag} is no workflow that can be read back; there are {', '.join(CONFIGS)}")
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply(changed, override)
    try:
        return kind.model_validate(_resolve(changed))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, source)) from error


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
    config.templates()
    check_models(config.models)
    check_sampling(config.models, _samplings(config))
    if config.benchmarks is not None:
        try:
            check_benchmarks(config.benchmarks)
        except BenchmarkFileError as error:
            raise ConfigError(f"benchmarks: {error}") from error
        for given in benchmark_samplings(config.benchmarks, [config.train.model]):
            check_sampling(config.models, given)
    for key, train in config.trained().items():
        try:
            validate_trainer_args(train.method, train.trainer_args)
        except TrainingInputError as error:
            raise ConfigError(f"{key}.{error}") from error


def check_models(models: Mapping[str, ModelSettings]) -> None:
    """Raises ConfigError for a model, a chat template or an engine argument that does not exist."""
    for key, model in models.items():
        if model.chat_template is not None and not os.path.isfile(model.chat_template):
            raise ConfigError(f"models.{key}.chat_template: there is no file {model.chat_template}")
        try:
            model.check()
        except (EngineStartError, ModelNotFound) as error:
            raise ConfigError(f"models.{key}: {error}") from error


def check_sampling(
    models: Mapping[str, ModelSettings], extras: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]]
) -> None:
    """Raises ConfigError for a sampling argument that an engine does not know.

    Args:
        extras: key of a block → the models that it is used on, and its `extra`.
    """
    for key, (names, extra) in extras.items():
        for name in names:
            try:
                models[name].check_extra(extra)
            except EngineStartError as error:
                raise ConfigError(f"{key}.extra: {error}") from error


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


__all__ = ["CONFIGS", "BaselinesConfig", "ConfigError", "DmapoConfig", "Rubric", "load_config", "read_config"]

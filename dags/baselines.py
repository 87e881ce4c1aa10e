"""Baselines: every training method on gated and on ungated data of the same candidates.

prompts → candidates → judges, critic ─┬→ gate ──────────────┐
                                       └→ best and worst of k ┴→ rows → datasets ─┬→ sft ──┐
                                                                                 ├→ dpo ──┤
                                                                                 ├→ kto ──┼→ responses → judges → table
                                                                                 ├→ orpo ─┤
                                                                                 └→ simpo ┘
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from dags.dmapo import DmapoConfig
from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.messages import first_problem, nearest
from ray_pipeline.config.settings import Settings
from ray_pipeline.config.starters import Starter
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.datasets import dataset_files
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.imported import preferences, tables_of
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.data.sources import InputError
from ray_pipeline.evaluate.method_table import PolicyName, TableSettings, method_table, rewrite_page
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.methods import METHODS, MethodName, method_label, method_of
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.registry import Workflow


class DataVariant(Settings):
    """How a dataset is made: from the run's candidates and scores, or from imported rows."""

    gated: bool = Field(
        True,
        description="let the confidence gate decide; if false, take the best and worst of k by mean score, "
        "whatever the score",
    )
    gate: dict[str, Any] = Field(
        default_factory=dict,
        description="overrides of the `gate` block ({use_variance: false}, {use_critic: false}, {tau: 1})",
    )
    judges: tuple[str, ...] | None = Field(None, min_length=1, description="whose scores count; default: all")
    k: int | None = Field(None, ge=2, description="number of candidates used of each prompt; default: all")
    min_gap: float | None = Field(
        None,
        ge=0,
        description="minimum gap of a pair's scores; default: datasets.min_gap with the gate, any gap above 0 without",
    )
    source: PreferenceSource | None = Field(
        None, description="import training rows from a Hub dataset or from files; excludes the keys above"
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        description="largest number of prompts to train on (smallest hashes kept): without a gate as many pairs, and "
        "twice as many KTO rows; default: all",
    )

    @model_validator(mode="after")
    def _one_way(self) -> DataVariant:
        set_here = sorted(self.model_fields_set - {"source", "max_prompts"})
        if self.source is not None and set_here:
            raise ValueError(f"{set_here[0]} has no effect on rows of a source, which are judged already; remove it")
        if not self.gated and self.gate:
            raise ValueError("gate has no effect when gated is false")
        return self


class BaselinesBlock(Settings):
    """The `baselines` block: every method is trained on every dataset with every seed."""

    methods: dict[MethodName, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict[str, Any]() for name in METHODS},
        min_length=1,
        description="method → overrides of the `train` block",
    )
    data: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], DataVariant] = Field(
        min_length=1, description="name → how the dataset is made"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="every method is trained with each of them"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, methods: Any) -> Any:
        """A plain list of methods means no overrides."""
        return {name: {} for name in methods} if isinstance(methods, (list, tuple)) else methods


class BaselinesConfig(DmapoConfig):
    """The configuration of `quorum run baselines`: a DMAPO configuration and the `baselines` block."""

    train: TrainSettings = TrainSettings()
    baselines: BaselinesBlock

    def check_kinds(self) -> None:
        """Raises ValueError for keys that `baselines` sets itself, and for an invalid comparison."""
        if self.judge.early_exit != "off":
            raise ValueError(
                "judge.early_exit skips what one gate does not need, but baselines.data makes datasets by several "
                "rules of the same verdicts; set it to off"
            )
        for name, block, keys, instead in (
            ("train", self.train, ("method", "seed"), "use baselines.methods and baselines.seeds"),
            ("datasets", self.datasets, ("kinds", "seed"), "it follows from baselines.methods and baselines.seeds"),
            ("evaluate", self.evaluate, ("perplexity", "perplexity_rows", "skip_generation"), "remove it"),
        ):
            for key in keys:
                if key in block.model_fields_set:
                    raise ValueError(f"{name}.{key} has no effect in a comparison; {instead}")
        if len(set(self.baselines.seeds)) < len(self.baselines.seeds):
            raise ValueError(f"duplicate seed in baselines.seeds: {list(self.baselines.seeds)}")
        for name, variant in self.baselines.data.items():
            unknown = [judge for judge in variant.judges or () if judge not in self.judge.names]
            if unknown:
                near = nearest(unknown[0], self.judge.names)
                raise ValueError(f"baselines.data.{name}.judges: unknown rubric {unknown[0]!r}{near}")
            drawn = sum(self.candidates.drawn.values())
            if variant.k is not None and drawn and variant.k > drawn:
                raise ValueError(
                    f"baselines.data.{name}.k is {variant.k}, but there are only {drawn} candidates for each prompt"
                )
            try:
                self.gate_of(variant)
                if variant.source is not None:
                    tables_of(variant.source.format, self.rows_of(variant))
            except (ValidationError, InputError) as error:
                raise ValueError(f"baselines.data.{name}: {_problem(error)}") from error
        for name in self.baselines.methods:
            try:
                self.training(name, 0)
            except ValidationError as error:
                raise ValueError(f"baselines.methods.{name}: {_problem(error)}") from error

    def workers(self) -> dict[str, float]:
        return {f"train-{policy.label}": self.train.num_workers for policy in self.policies()}

    def trained(self) -> dict[str, TrainSettings]:
        return {f"baselines.methods.{name}": self.training(name, 0) for name in self.baselines.methods}

    def training(self, method: MethodName, seed: int) -> TrainSettings:
        """The `train` block with a method's overrides."""
        shared = self.train.model_dump(exclude_unset=True)
        return TrainSettings.model_validate(
            {**shared, **self.baselines.methods[method], "method": method, "seed": seed}
        )

    def gate_of(self, variant: DataVariant) -> GateConfig | None:
        """The gate of a dataset; None without a gate."""
        if not variant.gated or variant.source is not None:
            return None
        if self.critic is None and variant.gate.get("use_critic"):
            raise InputError("gate.use_critic is true, but critic is null; remove one of the two")
        return GateConfig.model_validate({**self.gate.model_dump(), **variant.gate})

    def rows_of(self, variant: DataVariant, seed: int = 0) -> DatasetsConfig:
        """The `datasets` block of a dataset: the kinds that the methods need, shuffled by a seed."""
        kinds = list(dict.fromkeys(method_of(name).data for name in self.baselines.methods))
        gap = variant.min_gap if variant.min_gap is not None else self.datasets.min_gap if variant.gated else 0.0
        return self.datasets.model_copy(update={"kinds": kinds, "seed": seed, "min_gap": gap})

    def policies(self) -> list[PolicyName]:
        """Every policy that is trained, dataset by dataset and seed by seed."""
        compared = self.baselines
        return [
            PolicyName(label=f"{method_label(method)}-{data}-s{seed}", method=method, data=data, seed=seed)
            for data in compared.data
            for seed in compared.seeds
            for method in compared.methods
        ]

    def policy_labels(self) -> list[str]:
        return [policy.label for policy in self.policies()]

    def page(self) -> TableSettings:
        shown = self.report()
        data = self.baselines.data
        judge = self.models[self.evaluate.judge].shown
        return TableSettings(
            run_name=self.run.name,
            policies=tuple(self.policies()),
            mode=self.evaluate.modes[0].name,
            over=next((name for name, variant in data.items() if not variant.gated), next(iter(data))),
            data={name: self.how(variant) for name, variant in data.items()},
            facts={
                "base": self.base.shown,
                "comparing judge": f"{self.evaluate.judge} ({judge}), both orders, mode {self.evaluate.modes[0].name}",
                "rubric judges": ", ".join(f"{name} ({model})" for name, model in shown.curating.items()),
                **self._published(),
                "seeds": ", ".join(map(str, self.baselines.seeds)),
                "training": ", ".join(f"{k} {v}" for k, v in self.train.model_dump(exclude_unset=True).items()),
                "per method": "; ".join(f"{k}: {v}" for k, v in self.baselines.methods.items() if v) or "nothing",
            },
            curating=shown.curating if any(v.source is None for v in data.values()) else {},
            evaluating=shown.evaluating,
            checker=self.evaluate.checker,
            bootstrap_draws=self.evaluate.bootstrap_draws,
            seed=self.evaluate.seed,
        )

    def _published(self) -> dict[str, str]:
        """The line of the table that is the method of the paper, if any."""
        whole = [name for name, variant in self.baselines.data.items() if variant == DataVariant()]
        return {"DMAPO": f"kto on {whole[0]}"} if whole and "kto" in self.baselines.methods else {}

    def how(self, variant: DataVariant) -> str:
        if variant.source is not None:
            place = variant.source.name if variant.source.type == "huggingface" else variant.source.place
            return f"{variant.source.format} rows of {place}"
        judges = ", ".join(variant.judges or self.judge.names)
        k = variant.k or sum(self.candidates.drawn.values()) or "all"
        if not variant.gated:
            return f"best and worst of {k} by {judges}; no gate"
        gate = self.gate_of(variant)
        assert gate is not None
        rules = [f"tau {gate.tau:g}" if gate.use_variance else "no variance rule"]
        rules.append(f"alpha {gate.alpha:g}" if gate.use_critic else "no critic")
        return f"gate on {k} candidates by {judges}; {', '.join(rules)}"


def _problem(error: ValidationError | InputError) -> str:
    return str(error) if isinstance(error, InputError) else first_problem(error)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Candidates with their verdicts and critiques."""

    candidates: Stage
    verdicts: list[Stage]
    critiques: Stage | None


def baselines(config: BaselinesConfig, run_folder: str) -> Dag:
    """Methods × datasets × seeds; all policies respond to the same held-out prompts and are judged together."""
    texts, models, base = config.templates(), config.models, config.base
    prompts = prompts_stage(config.prompt_settings)
    judged = _judged(config, prompts)

    made = _datasets(config, prompts, judged)
    files = {stage.name: stage for stages in made.values() for stage in stages}
    trained: list[Stage] = []
    policies: dict[str, Stage] = {}
    measured = {"base": Answering(base)}
    for name in config.policies():
        settings = config.training(name.method, name.seed)
        length, data = config.datasets.max_length, files[f"datasets-{name.data}-s{name.seed}"]
        policy = train_stage(settings, base, length, data, name=f"train-{name.label}", view="")
        weights = base.trained(stage_folder(run_folder, policy).location, settings.save)
        policies[name.label] = responses_stage(name.label, config.evaluate, weights, prompts, policy)
        measured[name.label] = Answering(weights, policy)
        trained.append(policy)

    before = responses_stage("base", config.evaluate, base, prompts)
    responses = {"base": before, **policies}
    pairs = comparisons_stage(config.evaluate, models[config.evaluate.judge], texts.pairwise, prompts, before, policies)
    live = config.judge.live
    scores = (
        []
        if live is None
        else judge_stages(
            live, models, texts.judge, prompts, responses, "score-responses", "evaluate", "response verdicts"
        )
    )
    rows = [stages[0] for stages in made.values()]
    public = []
    if config.benchmarks is not None:
        page = config.benchmarks_page()
        public = benchmark_stages(config.benchmarks, page, models, measured, view="benchmarks")
    shown = [prompts, *rows, *trained, *responses.values(), pairs, *scores, *public[-1:]]
    return Dag("baselines", [*public, method_table(config.page(), shown)])


def _judged(config: BaselinesConfig, prompts: Stage) -> _Judged | None:
    """Candidates, verdicts and critiques, if any dataset is made from them."""
    own = [variant for variant in config.baselines.data.values() if variant.source is None]
    if not own:
        return None
    texts, models = config.templates(), config.models
    candidates = candidates_stage(config.candidates, models, prompts)
    verdicts = judge_stages(config.judge, models, texts.judge, prompts, {"candidates": candidates})
    critiques = None
    if any((decides := config.gate_of(variant)) is not None and decides.use_critic for variant in own):
        assert config.critic is not None  # gate_of
        critiques = critic_stage(config.critic, models[config.critic.model], texts.critic, prompts, candidates)
    return _Judged(candidates, verdicts, critiques)


def _datasets(config: BaselinesConfig, prompts: Stage, judged: _Judged | None) -> dict[str, list[Stage]]:
    """Stages of every dataset by its name: rows, then files for each seed."""
    rules = _scored(config)
    made: dict[str, list[Stage]] = {}
    for data, variant in config.baselines.data.items():
        if variant.source is not None:
            made[data] = _imported(config, data, variant.source)
            continue
        assert judged is not None
        decisions = rules[data].decide(judged.candidates, judged.verdicts, judged.critiques)
        made[data] = rules[data].write(prompts, judged.candidates, judged.verdicts, decisions)
    return made


def _scored(config: BaselinesConfig) -> dict[str, ScoredDataset]:
    """The datasets made from the run's own candidates, by name."""
    return {
        data: ScoredDataset(
            variant.judges or config.judge.names,
            config.gate_of(variant),
            config.base,
            _files(config, data),
            decisions=f"gate-{data}" if variant.gated else f"ranks-{data}",
            rows=f"rows-{data}",
            first=variant.k,
            cut=config.gate.cut,
            max_prompts=variant.max_prompts,
            origin=Provenance.of(config, "" if variant.gated else config.how(variant)),
        )
        for data, variant in config.baselines.data.items()
        if variant.source is None
    }


def _files(config: BaselinesConfig, data: str) -> dict[str, DatasetsConfig]:
    """The stages that write a dataset's training files, one for each seed, and their settings."""
    variant = config.baselines.data[data]
    return {f"datasets-{data}-s{seed}": config.rows_of(variant, seed) for seed in config.baselines.seeds}


def _imported(config: BaselinesConfig, data: str, source: PreferenceSource) -> list[Stage]:
    variant, seeding = config.baselines.data[data], config.prompts
    rows = preferences(
        source,
        config.rows_of(variant),
        config.base,
        seed=seeding.seed,
        val_fraction=seeding.val_fraction,
        name=f"rows-{data}",
    )
    judges = config.judge.names
    origin = Provenance.of(config, config.how(variant), license=source.license, imported=source.model_dump(mode="json"))
    return [
        rows,
        *(
            dataset_files(
                settings,
                None,
                judges,
                rows,
                config.base,
                name=name,
                view="",
                origin=origin,
                max_prompts=variant.max_prompts,
            )
            for name, settings in _files(config, data).items()
        ),
    ]


def scored(config: BaselinesConfig) -> list[ScoredDataset]:
    """The datasets made from the run's own candidates, with a gate and without."""
    return list(_scored(config).values())


def audit(run: Run, config: BaselinesConfig) -> Audit:
    """Walk every row back that the gate made from all prompts and candidates; the rows of other datasets follow other
    rules.

    Raises:
        StoreError: a dataset is not done yet, or none can be audited.
    """
    whole = {data: one for data, one in _scored(config).items() if one.first is None and one.max_prompts is None}
    made = {data: one for data, one in whole.items() if one.gate is not None}
    skipped = [data for data in config.baselines.data if data not in made]
    return audit_gated(run, list(made.values()), skipped, config.judge.programs)


WORKFLOW = register("workflow", "baselines")(
    Workflow(
        name="baselines",
        pocket="pocket_baselines",
        starters={"laptop": Starter("pocket_baselines"), "gpus": Starter("baselines")},
        config=BaselinesConfig,
        wire=baselines,
        page=rewrite_page,
        numbers="metrics.json",
        audit=audit,
        scored=scored,
        thresholds=("gate.", "datasets.", "baselines.data."),
    )
)

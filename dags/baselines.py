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

from pydantic import ValidationError

from ray_pipeline.audit.run import Audit, audit_gated
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.messages import first_problem, nearest
from ray_pipeline.config.starters import NO_WEIGHTS, Starter
from ray_pipeline.data.candidates import candidates as candidates_stage
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.critic import critic as critic_stage
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.datasets import dataset_files, of_size
from ray_pipeline.data.gate import GateConfig, check_pool
from ray_pipeline.data.imported import preferences, tables_of
from ray_pipeline.data.judging import judges as judge_stages
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.variants import DataVariant
from ray_pipeline.evaluate.method_table import PolicyName, Reading, TableSettings, method_table, rewrite_page
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.stage import Dag, Stage
from ray_pipeline.policy.comparisons import comparisons as comparisons_stage
from ray_pipeline.policy.comparisons import responses as responses_stage
from ray_pipeline.policy.train import train as train_stage
from ray_pipeline.training.methods import MethodName, method_label, method_of
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.compared import BaselinesBlock
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import Workflow


class BaselinesConfig(DmapoConfig):
    """The configuration of `quorum run baselines`: a DMAPO configuration and the `baselines` block."""

    takes_reward_models = False

    train: TrainSettings = TrainSettings()
    baselines: BaselinesBlock

    def check_kinds(self) -> None:
        """Raises ValueError for keys that `baselines` sets itself, and for an invalid comparison."""
        if self.exit_rule is not None:
            raise ValueError(
                f"{self.exit_rule.key} skips what one gate does not need, but "
                "baselines.data makes datasets by several rules of the same verdicts; remove it"
            )
        if self.rounds is not None:
            raise ValueError("rounds has no effect in a comparison; use the workflow dmapo")
        for name, block, keys, instead in (
            ("train", self.train, ("method", "seed"), "use baselines.methods and baselines.seeds"),
            ("datasets", self.datasets, ("kinds", "seed"), "it follows from baselines.methods and baselines.seeds"),
            ("evaluate", self.evaluate, ("perplexity", "perplexity_rows", "skip_generation"), "remove it"),
        ):
            for key in keys:
                if key in block.model_fields_set:
                    raise ValueError(f"{name}.{key} has no effect in a comparison; {instead}")
        self.baselines.check()
        for name in self.baselines.methods:
            if method_of(name).weighted and not self.datasets.weights:
                raise ValueError(f"baselines.methods.{name} reads weights of rows; set datasets.weights to true")
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
            if variant.keep == "confidence" and not self.datasets.weights:
                raise ValueError(f"baselines.data.{name}.keep: confidence needs datasets.weights to be true")
            if variant.keep != "random" and "sft" in self.rows_of(variant).kinds:
                raise ValueError(
                    f"baselines.data.{name}.keep: {variant.keep} orders kto and dpo rows; remove sft from the methods"
                )
            try:
                variant.check_fault(self.gate_of(variant))
                check_pool(self.gate_of(variant), variant.judges or self.judge.names)
                if variant.source is not None:
                    tables_of(variant.source.format, self.rows_of(variant))
            except ValueError as error:
                raise ValueError(f"baselines.data.{name}: {_problem(error)}") from error
        for name in self.baselines.methods:
            try:
                packing = self.training(name, 0).trainer_args.get("packing")
            except ValidationError as error:
                raise ValueError(f"baselines.methods.{name}: {_problem(error)}") from error
            if packing and "steps" in self.baselines.readings:
                raise ValueError(
                    f"baselines.readings: equal steps are counted in rows, but those of {name} are packed; remove "
                    "steps, or trainer_args.packing"
                )

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
            PolicyName(
                label="-".join([method_label(method), data, *([reading] if reading != "epochs" else []), f"s{seed}"]),
                method=method,
                data=data,
                seed=seed,
                reading=reading,
            )
            for data in compared.data
            for reading in compared.readings
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
            over=self.baselines.compared_with,
            data={name: self.how(variant) for name, variant in data.items()},
            facts={
                "base": self.base.shown,
                "comparing judge": f"{self.evaluate.judge} ({judge}), both orders, mode {self.evaluate.modes[0].name}",
                "rubric judges": ", ".join(f"{name} ({model})" for name, model in shown.curating.items()),
                **self._published(),
                "seeds": ", ".join(map(str, self.baselines.seeds)),
                **({} if self.baselines.readings == ("epochs",) else {"readings": ", ".join(self.baselines.readings)}),
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
        return variant.how(self.judge.names, sum(self.candidates.drawn.values()), self.gate_of(variant))


def _problem(error: ValueError) -> str:
    return first_problem(error) if isinstance(error, ValidationError) else str(error)


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
    files = _training_files(config, made)
    trained: list[Stage] = []
    policies: dict[str, Stage] = {}
    measured = {"base": Answering(base)}
    alike: dict[tuple[MethodName, int], list[str]] = {}
    for name in config.policies():
        alike.setdefault((name.method, name.seed), []).append(f"train-{name.label}")
    for name in config.policies():
        settings = config.training(name.method, name.seed)
        length, data = config.datasets.max_length, files[name.data, name.reading, name.seed]
        steps_of = files[config.baselines.compared_with, "epochs", name.seed] if name.reading == "steps" else None
        same = alike[name.method, name.seed]
        policy = train_stage(
            settings, base, length, data, name=f"train-{name.label}", view="", steps_of=steps_of, alike=same
        )
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
        else judge_stages(live, models, texts, prompts, responses, "score-responses", "evaluate", "response verdicts")
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
    candidates = candidates_stage(config.candidates, models, prompts, config.prompts.decontaminate)
    verdicts = judge_stages(config.judge, models, texts, prompts, {"candidates": candidates})
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


def _training_files(config: BaselinesConfig, made: dict[str, list[Stage]]) -> dict[tuple[str, Reading, int], Stage]:
    """What a policy is trained on, by dataset, reading and seed."""
    whole = {stage.name: stage for stages in made.values() for stage in stages}
    files: dict[tuple[str, Reading, int], Stage] = {}
    for seed in config.baselines.seeds:
        own = {data: whole[f"datasets-{data}-s{seed}"] for data in config.baselines.data}
        for data, variant in config.baselines.data.items():
            if variant.size_of is not None:
                own[data] = of_size(own[data], [own[variant.size_of]], f"datasets-{data}-cut-s{seed}")
        for data, stage in own.items():
            files[data, "epochs", seed] = files[data, "steps", seed] = stage
            files[data, "rows", seed] = of_size(stage, own.values(), f"datasets-{data}-rows-s{seed}")
    return files


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
            rejected=variant.rejected,
            max_prompts=variant.max_prompts,
            keep=variant.keep,
            fault=variant.fault,
            fault_share=variant.fault_share,
            scale=config.judge.scale,
            origin=Provenance.of(config, config.how(variant) if variant.departs else ""),
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
        decontaminate=seeding.decontaminate,
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
                keep=variant.keep,
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
    plain = {data for data, variant in config.baselines.data.items() if not variant.departs}
    whole = {data: one for data, one in _scored(config).items() if one.first is None and one.max_prompts is None}
    made = {data: one for data, one in whole.items() if data in plain}
    skipped = [data for data in config.baselines.data if data not in made]
    return audit_gated(run, list(made.values()), skipped, config.judge)


WORKFLOW = register("workflow", "baselines")(
    Workflow(
        name="baselines",
        pocket="pocket_baselines",
        starters={"laptop": Starter("pocket_baselines"), "gpus": Starter("baselines")},
        not_on={
            "endpoint": NO_WEIGHTS
            + "; to measure models that are at an endpoint: `quorum init benchmarks --for endpoint`"
        },
        config=BaselinesConfig,
        wire=baselines,
        page=rewrite_page,
        numbers="metrics.json",
        audit=audit,
        scored=scored,
        thresholds=("gate.", "datasets.", "baselines.data."),
    )
)

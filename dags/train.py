"""Train: a policy on preferences made elsewhere, measured on the held-out part of their prompts.

rows of a file or dataset ─┬→ datasets → train ─┐
                           └→ held-out prompts ─┴→ responses of base and policy → comparisons → report
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from ray_pipeline.audit.imported import audit_imported
from ray_pipeline.audit.run import Audit
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.starters import NO_WEIGHTS, Starter
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.datasets import dataset_files
from ray_pipeline.data.imported import GIVES, preferences, tables_of
from ray_pipeline.data.imported_prompts import imported_prompts
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.tokens import token_counter
from ray_pipeline.evaluate.stage import ReportSettings, write_report
from ray_pipeline.extensions import register
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import Dag
from ray_pipeline.store.errors import StoreError
from ray_pipeline.training.methods import method_of
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.registry import Workflow
from ray_pipeline.workflow.stages import trained
from ray_pipeline.workflow.training import TrainingConfig

#: Format of the rows → the method that is usual for them.
_METHODS = {"paired": "dpo", "unpaired": "kto", "demonstrations": "sft"}


class TrainConfig(TrainingConfig):
    """The configuration of `quorum run train`. What `train.method`, `datasets.kinds` and `evaluate.perplexity` are
    where they are not set follows from the format of the rows."""

    takes_reward_models = True

    run: RunBlock = RunBlock(name="train")
    train: TrainSettings = TrainSettings()
    preferences: PreferenceSource = Field(
        description="your rows: pairs (prompt, chosen, rejected), labelled answers (prompt, completion, label) or "
        "demonstrations"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_format(cls, values: Any) -> Any:
        """Defaults that follow from the format of the rows."""
        if not isinstance(values, Mapping) or not isinstance(values.get("preferences"), Mapping):
            return values
        form = values["preferences"].get("format", "paired")
        blocks = {name: values.get(name, {}) for name in ("train", "datasets", "evaluate")}
        if form not in GIVES or not all(isinstance(block, Mapping) for block in blocks.values()):
            return values
        train = {"method": _METHODS[form], **blocks["train"]}
        datasets = {"kinds": list(GIVES[form]), **blocks["datasets"]}
        evaluate = {**({} if "kto" in datasets["kinds"] else {"perplexity": False}), **blocks["evaluate"]}
        return {**values, "train": train, "datasets": datasets, "evaluate": evaluate}

    @field_validator("prompts")
    @classmethod
    def _of_the_rows(cls, prompts: PromptsConfig) -> PromptsConfig:
        untouched = PromptsConfig()
        for key in ("sources", "max_prompts"):
            if getattr(prompts, key) != getattr(untouched, key):
                raise ValueError(f"{key} has no effect: the prompts are those of the rows in preferences; remove it")
        return prompts

    def check_kinds(self) -> None:
        try:
            tables_of(self.preferences.format, self.datasets)
            kind = method_of(self.train.method).data
            tables_of(self.preferences.format, self.datasets.model_copy(update={"kinds": [kind]}))
        except InputError as error:
            raise ValueError(f"preferences: {error}") from error
        super().check_kinds()

    @property
    def origin(self) -> Provenance:
        """Where the preferences are from, for the dataset cards."""
        rows = self.preferences
        text = f"{rows.format} rows of {rows.place}"
        return Provenance.of(self, text, license=rows.license, imported=rows.model_dump(mode="json"))

    def report(self) -> ReportSettings:
        """The facts of the report that are in no table."""
        trained = ["train", "evaluate"] if self.trains_policy else []
        return self.report_of({}, workflow="train", stages=("prompts", "datasets", *trained))


def train(config: TrainConfig, run_folder: str) -> Dag:
    """Rows to policy to win rate; the evaluation loads the policy from `run_folder`."""
    seeding, limits = config.prompts, config.datasets
    rows = preferences(
        config.preferences,
        limits,
        config.base,
        seed=seeding.seed,
        val_fraction=seeding.val_fraction,
        decontaminate=seeding.decontaminate,
        name="rows",
    )
    prompts = imported_prompts(rows, config.preferences.default_label)
    datasets = dataset_files(limits, None, (), rows, config.base, origin=config.origin)
    stages = [rows, prompts, datasets, *trained(config, run_folder, prompts, datasets, None)]
    return Dag("train", [*stages, config.report_stage(stages)])


def audit(run: Run, config: TrainConfig) -> Audit:
    """Find every training row again in the source. Raises StoreError where the run has no datasets yet, or where the
    source cannot be read any more."""
    if "datasets" not in run.results:
        raise StoreError(f"{run.folder.location} cannot be audited yet: datasets is not done; run it first")
    try:
        report = audit_imported(
            config.preferences,
            run.results["datasets"].folder,
            config.datasets,
            config.prompts.seed,
            config.prompts.val_fraction,
            run.results["rows"].facts.get("digests"),
            token_counter(config.base.tokenizer),
        )
    except InputError as error:
        raise StoreError(f"the rows of {run.folder.location} cannot be read again: {error}") from error
    return Audit({"datasets": report})


WORKFLOW = register("workflow", "train")(
    Workflow(
        name="train",
        pocket="pocket_train",
        starters={"laptop": Starter("pocket_train"), "gpus": Starter("train")},
        not_on={"endpoint": NO_WEIGHTS},
        config=TrainConfig,
        wire=train,
        page=write_report,
        numbers="metrics.json",
        audit=audit,
        thresholds=(),
    )
)

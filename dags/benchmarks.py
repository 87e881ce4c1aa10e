"""Public benchmarks: several models, one run.

questions → answers of each model ─┬→ MT-Bench and AlpacaEval judges ─┬→ scores
          └→ floors ───────────────┴→ IFEval checkers ────────────────┘
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from ray_pipeline.bench.measured import Origin, measured_models
from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model, rewrite_page
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.config.blocks import RunBlock
from ray_pipeline.config.starters import Starter
from ray_pipeline.engines.models import ModelSettings, ModelUse, resolve_model
from ray_pipeline.extensions import register
from ray_pipeline.graph.stage import Dag
from ray_pipeline.store.keys import check_num_shards
from ray_pipeline.workflow.config import ModelKey, RunConfig
from ray_pipeline.workflow.registry import Workflow


class BenchmarksConfig(RunConfig):
    """The configuration of `quorum run benchmarks`.

    In the file `models` is a list of the models to evaluate: a run folder (its policy), a model's name, or a block of
    keys.
    """

    run: RunBlock = RunBlock(name="benchmarks")
    model_defaults: dict[str, Any] = Field(default_factory=dict, description="default keys of every evaluated model")
    origins: dict[ModelKey, Origin] = Field(
        default_factory=dict, description="where the evaluated models come from; derived from `models`"
    )
    judges: dict[ModelKey, ModelSettings] = Field(
        default_factory=dict, description="judge models by the key that names them in `benchmarks`"
    )
    benchmarks: BenchmarksSettings
    num_shards: int = Field(16, description="shards of every table; a power of two up to 1024")

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        judges = values.get("judges")
        if isinstance(judges, Mapping):
            values = {**values, "judges": {key: resolve_model(model) for key, model in judges.items()}}
        return super().resolve(values)

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        """Expand the list of models into blocks."""
        if not isinstance(values, Mapping) or not isinstance(values.get("models"), (list, tuple)):
            return values
        models, origins = measured_models(values["models"], values.get("model_defaults") or {})
        return {**values, "models": models, "origins": origins}

    @field_validator("num_shards")
    @classmethod
    def _shards(cls, num_shards: int) -> int:
        return check_num_shards(num_shards)

    def blocks(self) -> dict[str, dict[str, ModelSettings]]:
        return {"models": self.models, "judges": self.judges}

    def uses(self) -> Sequence[ModelUse]:
        measured = {f"models.{name}": name for name in self.models}
        return self.benchmarks.uses(measured, "judges")

    @model_validator(mode="after")
    def _consistent(self) -> BenchmarksConfig:
        if not self.models:
            raise ValueError("models is empty; list at least one model or run folder to evaluate")
        if "floors" in self.models:
            raise ValueError("floors cannot name a model: the tables use it; give that model another `name`")
        self.benchmarks.check_baselines(self.models)
        return self

    @functools.cached_property
    def _page(self) -> BenchmarksPage:
        nowhere = Origin()
        return BenchmarksPage(
            run_name=self.run.name,
            benchmarks=self.benchmarks,
            models={
                name: MeasuredModel(
                    shown=self.origins.get(name, nowhere).shown or model.shown,
                    identity="+".join(model.weights().values()),
                    curating=self.origins.get(name, nowhere).curating,
                )
                for name, model in self.models.items()
            },
            judges={key: judging_model(model) for key, model in self.judges.items()},
        )

    def page(self) -> BenchmarksPage:
        return self._page

    def check(self) -> None:
        super().check()
        self.benchmarks.check()


def benchmarks(config: BenchmarksConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    measured = {name: Answering(model) for name, model in config.models.items()}
    return Dag(
        "benchmarks",
        benchmark_stages(config.benchmarks, config.page(), config.judges, measured),
    )


WORKFLOW = register("workflow", "benchmarks")(
    Workflow(
        name="benchmarks",
        pocket="pocket_benchmarks",
        starters={
            "laptop": Starter("pocket_benchmarks"),
            "gpus": Starter("benchmarks"),
            "endpoint": Starter("endpoint_benchmarks"),
        },
        config=BenchmarksConfig,
        wire=benchmarks,
        page=rewrite_page,
        numbers="benchmarks.json",
    )
)

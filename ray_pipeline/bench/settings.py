"""The `benchmarks` block: which benchmarks a run has, and everything that they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.alpaca_eval.benchmark import AlpacaEvalSettings
from ray_pipeline.bench.benchmark import Benchmark, OwnBenchmark
from ray_pipeline.bench.ifeval.benchmark import IfevalSettings
from ray_pipeline.bench.mt_bench.benchmark import MtBenchSettings
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.graph.asking import Row
from ray_pipeline.store.keys import unit_hash

FloorName = Literal["empty", "x", "echo", "constant"]


class BenchmarksSettings(Settings):
    """The `benchmarks` block: which public benchmarks are run; one that is null is not."""

    mt_bench: MtBenchSettings | None = Field(None, description="MT-Bench; null: left out")
    alpaca_eval: AlpacaEvalSettings | None = Field(None, description="AlpacaEval 2; null: left out")
    ifeval: IfevalSettings | None = Field(None, description="IFEval; null: left out")
    own: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], OwnBenchmark] = Field(
        default_factory=dict,
        description="further benchmarks by their name in the tables; `type` is a registered name, or a file that "
        "registers a benchmark (my_benchmark.py), and the other keys are that benchmark's",
    )
    floors: tuple[FloorName, ...] = Field(
        (), description="trivial baselines that run on every benchmark beside the models"
    )
    seed: int = Field(0, description="of warm answers and of `limit`")
    draws: int = Field(2000, ge=100, description="bootstrap samples of every interval")

    @model_validator(mode="after")
    def _something(self) -> BenchmarksSettings:
        if not self.chosen:
            raise ValueError(
                "no benchmark is chosen; name mt_bench, alpaca_eval or ifeval ({} takes its defaults), or one under own"
            )
        if taken := sorted(self.own.keys() & type(self).model_fields.keys()):
            raise ValueError(f"own.{taken[0]}: the name is taken; rename the benchmark")
        if len(set(self.floors)) < len(self.floors):
            raise ValueError(f"duplicate floors: {', '.join(self.floors)}")
        return self

    @property
    def chosen(self) -> dict[str, Benchmark]:
        """The blocks of the chosen benchmarks by name, in order."""
        keys = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: block for name, block in keys.items() if isinstance(block, Benchmark)} | self.own

    @property
    def judges(self) -> list[str]:
        """Keys of the judging models, in the order of the benchmarks."""
        return list(dict.fromkeys(judge for block in self.chosen.values() for judge, _ in block.judged().values()))

    def place(self, name: str) -> str:
        """Path of a benchmark's block in the configuration."""
        return f"benchmarks.own.{name}" if name in self.own else f"benchmarks.{name}"

    def sources(self) -> dict[str, str]:
        """Key of every question file → its place."""
        return {f"{name}.{key}": place for name, block in self.chosen.items() for key, place in block.sources().items()}

    def score_sources(self) -> dict[str, str]:
        """Key of every further file that scores depend on → its place. Keys of stored runs have no benchmark's name."""
        return {
            f"{name}.{key}" if name in self.own else key: place
            for name, block in self.chosen.items()
            for key, place in block.score_sources().items()
        }

    def rows(self) -> list[Row]:
        """Rows of the questions table, benchmark by benchmark in the order of the files, each cut to its limit.

        Raises:
            BenchmarkFileError: a file cannot be used.
        """
        kept = []
        for name, block in self.chosen.items():
            rows = [{**row, "benchmark": name} for row in block.rows()]
            by_hash = sorted(rows, key=lambda row: unit_hash("bench", self.seed, row["benchmark"], row["question_id"]))
            ids = {row["question_id"] for row in by_hash[: block.limit]}
            kept += [row for row in rows if row["question_id"] in ids]
        return kept

    def check(self) -> None:
        """Check everything that the benchmarks need beside models: files, judge prompts and checkers.

        Raises:
            BenchmarkFileError: something is missing or wrong; the message names it and the remedy.
            TemplateError: a prompt file is not one.
        """
        rows = self.rows()
        for name, block in self.chosen.items():
            block.check([row for row in rows if row["benchmark"] == name])

    def check_baselines(self, models: Collection[str]) -> None:
        """Raise ValueError unless the models that others are compared with are measured."""
        for name, block in self.chosen.items():
            for key, model in block.baselines().items():
                if model not in models:
                    raise ValueError(
                        f"{self.place(name)}.{key} is {model!r}, which is not a model of this run; choose from "
                        f"{', '.join(models)}"
                    )

    def uses(self, measured: Mapping[str, str], judges: str = "models") -> list[ModelUse]:
        """The keys that choose a model.

        Args:
            measured: key of the configuration → the measured model's key under `models`.
            judges: the block that judging models are chosen from.
        """
        uses = []
        for name, block in self.chosen.items():
            for key, (judge, sampling) in block.judged().items():
                where = self.place(name)
                uses.append(ModelUse(f"{where}.judge", judge, "judge", f"{where}.{key}", sampling.extra, judges))
        for key, model in measured.items():
            uses.append(ModelUse(key, model, "generate"))
            for name, block in self.chosen.items():
                if isinstance(answering := block.answering(), SamplingSettings):
                    where = f"{self.place(name)}.sampling"
                    uses.append(ModelUse(key, model, "generate", where, answering.extra))
        return uses

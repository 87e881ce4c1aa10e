"""The public benchmarks of a run: the block that chooses them, and the table of their questions.

A benchmark is a folder beside this file whose settings implement `Benchmark`, and a field of `BenchmarksSettings`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.alpaca_eval.questions import AlpacaEvalSettings
from ray_pipeline.bench.files import BenchmarkFileError, read_text, source_rows
from ray_pipeline.bench.ifeval.questions import IfevalSettings
from ray_pipeline.bench.mt_bench.questions import MtBenchSettings
from ray_pipeline.bench.schemas import BENCH_QUESTIONS
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.identity import text_digest
from ray_pipeline.graph.asking import Row
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.pocket.bench_files import is_pocket
from ray_pipeline.store.keys import canonical_json, shard_of, unit_hash
from ray_pipeline.store.schemas import to_table
from ray_pipeline.store.tables import ShardedTable

if TYPE_CHECKING:
    from ray_pipeline.bench.scores import Measurement, Scored

FloorName = Literal["empty", "x", "echo", "constant"]


class Benchmark(Protocol):
    """What the settings of a benchmark provide to the stages that all benchmarks share."""

    @property
    def limit(self) -> int | None:
        """Maximum number of questions (smallest hashes kept)."""

    def sources(self) -> dict[str, str]:
        """Place of every question file by its key."""

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the questions table in the order of the file. Raises BenchmarkFileError."""

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check everything beside models: judge prompts, checkers, further files, given the rows of the questions.

        Raises BenchmarkFileError or TemplateError.
        """

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        """Key of every sampling of a judge below this block, with the judge's key; empty where no model judges."""

    def judging(self) -> BenchmarkJudging | None:
        """What the judge of this benchmark needs; None where no model judges. Raises as `check`."""

    def checks(self, inputs: Mapping[str, Stage]) -> list[Stage]:
        """Stages that judge all answers without a model; inputs as in `judge_stages`."""

    def answered(self) -> dict[str, SamplingSettings]:
        """Key of every sampling of the measured models below this block."""

    def scores(self, run: Measurement) -> Scored:
        """Scores of all models from the stored tables; empty as long as they are missing."""


class BenchmarkJudging(Protocol):
    """What one judge model does for one benchmark: settings that decide its verdicts, and the calls."""

    def tables(self) -> dict[str, str | None]:
        """Kinds of table in order, each with the model that all others are compared with, if any."""

    async def judge(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        """Rows on one model's answers to a question, without the columns of `tables.question_key`."""


class BenchmarksSettings(Settings):
    """The `benchmarks` block: which public benchmarks are run; one that is null is not."""

    mt_bench: MtBenchSettings | None = Field(None, description="MT-Bench; null: left out")
    alpaca_eval: AlpacaEvalSettings | None = Field(None, description="AlpacaEval 2; null: left out")
    ifeval: IfevalSettings | None = Field(None, description="IFEval; null: left out")
    floors: tuple[FloorName, ...] = Field(
        (), description="trivial baselines that run on every benchmark beside the models"
    )
    seed: int = Field(0, description="of warm answers and of `limit`")
    draws: int = Field(2000, ge=100, description="bootstrap samples of every interval")

    @model_validator(mode="after")
    def _something(self) -> BenchmarksSettings:
        if not self.chosen:
            raise ValueError("no benchmark is chosen; name mt_bench, alpaca_eval or ifeval ({} takes its defaults)")
        if len(set(self.floors)) < len(self.floors):
            raise ValueError(f"duplicate floors: {', '.join(self.floors)}")
        return self

    @property
    def chosen(self) -> dict[str, Benchmark]:
        """The blocks of the chosen benchmarks by name, in order."""
        blocks: dict[str, Benchmark | None] = {
            "mt_bench": self.mt_bench,
            "alpaca_eval": self.alpaca_eval,
            "ifeval": self.ifeval,
        }
        return {name: block for name, block in blocks.items() if block is not None}

    @property
    def judges(self) -> list[str]:
        """Keys of the judging models, in the order of the benchmarks."""
        return list(dict.fromkeys(judge for block in self.chosen.values() for judge, _ in block.judged().values()))

    def sources(self) -> dict[str, str]:
        """Key of every question file → its place."""
        return {f"{name}.{key}": place for name, block in self.chosen.items() for key, place in block.sources().items()}


@functools.cache
def _content(source: str) -> str:
    return text_digest(canonical_json(source_rows(source)) if is_pocket(source) else read_text(source))


def content_digests(sources: Mapping[str, str]) -> dict[str, str]:
    """Content digest of each file. Raises BenchmarkFileError, naming the key's file."""
    return {key: _content(source) for key, source in sources.items()}


@dataclasses.dataclass(frozen=True)
class _Given:
    settings: BenchmarksSettings
    digests: dict[str, str]


def questions_stage(settings: BenchmarksSettings) -> Stage:
    """The table of all questions of the chosen benchmarks. Raises BenchmarkFileError for a missing file."""
    digests = content_digests(settings.sources())
    limits = {name: block.limit for name, block in settings.chosen.items()}
    return Stage(
        name="bench-questions",
        group="bench-questions",
        work=WholeWork(function=make_questions, settings=_Given(settings, digests), tables=("bench_questions",)),
        config={"limits": limits, "seed": settings.seed},
        external=digests,
    )


def make_questions(given: WholeInput) -> dict[str, Any]:
    """Write the sharded table. Raises BadInput for a file that cannot be used, or that changed since the start."""
    known: _Given = given.settings
    try:
        if content_digests(known.settings.sources()) != known.digests:
            raise BadInput("a question file has changed since the run began; run the same command again")
        rows = question_rows(known.settings)
    except BenchmarkFileError as error:
        raise BadInput(str(error)) from error
    table = ShardedTable(given.folder.location, "bench_questions", given.num_shards, given.fingerprint)
    shards: list[list[dict[str, Any]]] = [[] for _ in range(given.num_shards)]
    for row in rows:
        shards[shard_of(row["prompt_id"], given.num_shards)].append(row)
    for shard, part in enumerate(shards):
        table.write(shard, to_table(part, BENCH_QUESTIONS))
    counts = {name: sum(row["benchmark"] == name for row in rows) for name in known.settings.chosen}
    given.log(", ".join(f"{name} {n}" for name, n in counts.items()))
    return {"counts": counts}


def question_rows(settings: BenchmarksSettings) -> list[dict[str, Any]]:
    """Rows of the questions table, benchmark by benchmark in the order of the files, each cut to its limit.

    Raises:
        BenchmarkFileError: a file cannot be used.
    """
    kept = []
    for block in settings.chosen.values():
        rows = block.rows()
        by_hash = sorted(rows, key=lambda row: unit_hash("bench", settings.seed, row["benchmark"], row["question_id"]))
        ids = {row["question_id"] for row in by_hash[: block.limit]}
        kept += [row for row in rows if row["question_id"] in ids]
    return kept

"""What a benchmark is: its questions, how answers are judged or checked, and how they are scored.

Subclass `Benchmark` and register the subclass under the kind `benchmark`: its fields are the keys of its block. Where
each verdict is a number, `ray_pipeline.bench.simple` does everything but the questions and the verdicts.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.tables import Tables
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import InputError, PromptSource, SourceRow
from ray_pipeline.engines.base import ChatEngine, Sampling
from ray_pipeline.extensions import find
from ray_pipeline.graph.asking import Row
from ray_pipeline.stats.protocol import Protocol as Measured
from ray_pipeline.stats.protocol import PublishedProtocol, ScoreName, score_name
from ray_pipeline.store.keys import digest, prompt_id

# --- questions and verdicts -------------------------------------------------------------------------------------------


class Judging(Protocol):
    """What one judge model does for one benchmark: settings that decide its verdicts, and the calls."""

    def decisive(self) -> dict[str, Any]:
        """What the verdicts depend on beside the judge, for the fingerprint."""

    def tables(self) -> dict[str, str | None]:
        """Kinds of table in order, each with the model that all others are compared with, if any."""

    async def verdicts(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        """Rows on one model's answers to a question, without the columns of `tables.question_key`."""


class Checking(Protocol):
    """What decides about answers without a model."""

    table: ClassVar[str]

    def decisive(self) -> dict[str, Any]:
        """What the verdicts depend on, for the fingerprint."""

    def verdicts(self, question: Row, answers: Sequence[Row]) -> list[Row]:
        """Rows as in `Judging.verdicts`. Raises BenchmarkFileError if something that it needs is missing here."""


class CategorySampling(Settings):
    """Sampling of answers with a temperature by category of the question."""

    answer_tokens: int
    temperatures: dict[str, float]
    other: ClassVar[float] = 0.7

    def sampling(self, category: str) -> Sampling:
        return Sampling(temperature=self.temperatures.get(category, self.other), max_tokens=self.answer_tokens)


class Benchmark(Settings, abc.ABC):
    """The block of one benchmark; `type` (a registered name, or a file) only where it is under `own`."""

    limit: int | None = Field(
        None, ge=1, description="maximum number of questions (smallest hashes kept); default: all"
    )
    #: How the configuration refers to it; empty for the keys that bear a benchmark's name.
    _type: str = PrivateAttr("")
    #: Its tables on the page (`Scored.tables`) → title.
    titles: ClassVar[Mapping[str, str]] = {}

    @abc.abstractmethod
    def rows(self) -> list[Row]:
        """All questions (`question_row`), in the order of the file. Raises BenchmarkFileError."""

    @abc.abstractmethod
    def answering(self) -> SamplingSettings | CategorySampling:
        """How the models answer: the settings that decide an answer, beside the model and the seed."""

    @abc.abstractmethod
    def scores(self, run: Measurement) -> Scored:
        """Scores of all models from the stored tables; empty as long as they are missing."""

    def sources(self) -> dict[str, str]:
        """Place of every question file by its key. Their content is part of the fingerprint."""
        return {}

    def score_sources(self) -> dict[str, str]:
        """Place of every further file that the scores depend on, by its key."""
        return {}

    def check(self, rows: Sequence[Row]) -> None:
        """Check everything beside models: judge prompts, checkers, further files, given the rows of the questions.

        Raises BenchmarkFileError or TemplateError.
        """

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        """Key of every sampling of a judge below this block, with the judge's key; empty where no model judges."""
        return {}

    def judging(self) -> Judging | None:
        """What the judge needs; None where no model judges. Raises as `check`."""
        return None

    def checking(self) -> Checking | None:
        """What checks answers without a model, if anything does. Raises BenchmarkFileError."""
        return None

    def baselines(self) -> dict[str, str]:
        """Key below this block → model that the others are compared with."""
        return {}

    @staticmethod
    def prompts_of(values: Mapping[str, Any]) -> PromptSource:
        """The questions of the benchmark of this `type` and keys, as `prompts.decontaminate.against` reads them."""
        return BenchmarkPrompts(type=values["type"], benchmark=benchmark_from(values))

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """With `type`, so that the digest of a user's file is part of the fingerprint."""
        return {**super().decisive(exclude), **({"type": self._type} if self._type else {})}

    @model_serializer(mode="wrap")
    def _with_type(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**({"type": self._type} if self._type else {}), **plain(self)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By reference and values: a class of a user's file is found again by whoever reads it.
        if not self._type:
            return super().__reduce_ex__(protocol)
        return benchmark_from, (self.model_dump(exclude_unset=True),)


def benchmark_from(values: Any) -> Benchmark:
    """The benchmark that an entry of `benchmarks.own` describes, by its `type`.

    Raises:
        ExtensionError, a ValueError: there is no such benchmark.
        ValidationError: its keys do not fit.
    """
    if isinstance(values, Benchmark):
        return values
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise ValueError("a benchmark of your own is a mapping with the key type, such as {type: my_benchmark.py}")
    keys = {key: value for key, value in values.items() if key != "type"}
    benchmark: Benchmark = find("benchmark", values["type"]).value.model_validate(keys)
    benchmark._type = values["type"]
    return benchmark


#: Any registered benchmark by its `type`.
OwnBenchmark = Annotated[
    SerializeAsAny[Benchmark], BeforeValidator(benchmark_from, json_schema_input_type=dict[str, Any])
]


class BenchmarkPrompts(PromptSource):
    """The questions of a benchmark as prompts, each turn by itself."""

    benchmark: OwnBenchmark

    def rows(self) -> Iterator[SourceRow]:
        try:
            questions = self.benchmark.rows()
        except BenchmarkFileError as error:
            raise InputError(f"prompts.decontaminate.against: {self.type}: {error}") from error
        for row in questions:
            yield from (SourceRow({"question": row["question_id"]}, turn) for turn in row["turns"])

    def digest(self) -> dict[str, str]:
        return {self.label_in_tables: digest(["questions", [row.value for row in self.rows()]])}

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The type alone: the digest is of the questions, and how they are answered and judged does not matter."""
        return {"type": self.type}

    @model_serializer
    def _as_block(self) -> dict[str, Any]:
        return self.benchmark.model_dump(mode="json", exclude_unset=True)

    def __reduce__(self) -> Any:
        return Benchmark.prompts_of, (self.benchmark.model_dump(exclude_unset=True),)


def question_row(identifier: Any, position: int, turns: Sequence[str], **more: Any) -> Row:
    """A row of the questions table (schema BENCH_QUESTIONS), without the benchmark's name."""
    return {
        "question_id": str(identifier),
        "prompt_id": prompt_id([{"role": "user", "content": turns[0]}]),
        "position": position,
        "category": "",
        "turns": list(turns),
        "references": None,
        "checks": None,
        **more,
    }


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of one model.

    Attributes:
        benchmark, metric: what is measured, in our terms ("mt_bench", "turn 1").
        name: what it may be called, by its protocol.
        value: None where nothing could be read, with the reason in `note`.
        low, high: 95 % interval, None where there is none.
        unit: "1–10" or "%".
        rows: what the value is the mean of; `unread` more could not be read.
        worst, best: the value had all unread rows been the worst or the best.
    """

    model: str
    benchmark: str
    metric: str
    name: ScoreName
    protocol: Measured
    value: float | None
    low: float | None
    high: float | None
    rows: int
    unread: int
    worst: float | None
    best: float | None
    unit: str = "%"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one model's answers were read on one benchmark, beside its scores. Shares are between 0 and 1."""

    model: str
    benchmark: str
    statuses: Mapping[str, int]
    contradictory: int = 0
    flip_rate: float | None = None
    mean_chars: float | None = None
    chance: int = 0


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who judges, for the protocol: identity, and settings beside the sampling that an exact protocol has none of."""

    identity: str
    setup: str = ""

    def marked(self, protocol: Measured) -> Measured:
        """The protocol with the judge's own settings in it."""
        if not self.setup:
            return protocol
        return dataclasses.replace(protocol, judge_sampling=f"{protocol.judge_sampling} {self.setup}")


def make_score(
    model: str,
    benchmark: str,
    metric: str,
    protocol: Measured,
    published: PublishedProtocol | None,
    **figure: Any,
) -> Score:
    """A score under the name that its protocol allows; `figure`: the other attributes of `Score`."""
    return Score(model, benchmark, metric, score_name(protocol, published), protocol, **figure)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the scores of one benchmark are computed from.

    Attributes:
        benchmark: its name in the tables.
        names: of the measured models, floors last.
        judges: by the keys that the benchmarks name.
        draws, seed: of every bootstrap.
    """

    benchmark: str
    tables: Tables
    names: Sequence[str]
    judges: Mapping[str, Judge]
    draws: int
    seed: int

    @property
    def questions(self) -> list[Row]:
        """Rows of the questions table, in the order of the file."""
        return [row for row in self.tables.questions if row["benchmark"] == self.benchmark]

    def answer(self, question: Row, model: str) -> str | None:
        """A model's answer to the first turn."""
        text: str | None = self.tables.answers[self.benchmark, question["question_id"], model][0]["answer"]
        return text

    def verdicts(self, kind: str) -> dict[str, list[Row]]:
        """Rows of a table of verdicts by model, in the order of `names`; empty where it is not made yet."""
        rows = [row for row in self.tables.rows(kind) if row["benchmark"] == self.benchmark]
        return {name: [row for row in rows if row["model"] == name] for name in self.names} if rows else {}


@dataclasses.dataclass
class Scored:
    """What one benchmark adds to the page: scores, how answers were read, and its own tables by name."""

    scores: list[Score] = dataclasses.field(default_factory=list)
    readings: list[Reading] = dataclasses.field(default_factory=list)
    tables: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def add(self, scores: Sequence[Score], reading: Reading, table: str = "", rows: Sequence[Any] = ()) -> None:
        """Add one model's part; `rows` are plain mappings or Arrow tables of the table that is called `table`."""
        self.scores += scores
        self.readings.append(reading)
        if rows:
            self.tables.setdefault(table, []).extend(rows)


def count_statuses(statuses: Iterable[str]) -> dict[str, int]:
    """How often each status occurs, by name."""
    return dict(sorted(collections.Counter(statuses).items()))


def percent(share: float | None) -> float | None:
    """A share as a percentage."""
    return None if share is None else 100 * share

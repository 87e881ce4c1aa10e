"""MT-Bench's questions: 80 of two turns, the settings that choose them, and their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.files import OWN, BenchmarkFileError, need, question_row, read_rows, source_rows
from ray_pipeline.bench.judge_prompts import BenchPrompt, mt_bench_prompts, own_mt_bench_prompts
from ray_pipeline.bench.mt_bench.judge import BenchAsking
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Sampling

if TYPE_CHECKING:
    from ray_pipeline.bench.questions import BenchmarkJudging
    from ray_pipeline.bench.scores import Measurement, Scored
    from ray_pipeline.graph.stage import Stage

#: Temperature of the answers by category; any other category has 0.7.
CATEGORY_TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
#: New tokens of an answer.
ANSWER_TOKENS = 1024
#: Categories that are judged with a reference answer.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

Mode = Literal["single", "pairwise"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: its two turns, and the reference answers where its category has them."""

    question_id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None

    @property
    def temperature(self) -> float:
        return CATEGORY_TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


class MtBenchSettings(Settings):
    """The `mt_bench` block. The defaults are the published protocol, except for the judge and its prompts."""

    questions: str = Field(
        "hf://spaces/lmsys/mt-bench/data/mt_bench/question.jsonl", description="question file in the published form"
    )
    references: str | None = Field(
        "hf://spaces/pe-nlp/mt-bench/data/mt_bench/reference_answer/gpt-4.jsonl",
        description="reference answers shown in math, reasoning and coding; null: none",
    )
    reference_name: str = Field("gpt-4", description="model whose answers the reference file holds")
    prompts: str = Field(OWN, description="judge prompts in the published form; `own`: the project's wording")
    judge: str = Field("judge", description="key of the judging model")
    asking: BenchAsking = BenchAsking()
    modes: tuple[Mode, ...] = Field(
        ("single",),
        min_length=1,
        description="grades of single answers, comparisons with `against` in both orders, or both",
    )
    against: str = Field("base", description="model (by its name in this run) that the others are compared with")
    answer_tokens: int = Field(ANSWER_TOKENS, ge=1, description="maximum number of new tokens of an answer")
    temperatures: dict[str, float] = Field(
        default_factory=lambda: dict(CATEGORY_TEMPERATURES), description="category → temperature of the answers"
    )
    limit: int | None = Field(
        None, ge=1, description="maximum number of questions (smallest hashes kept); default: all"
    )

    def load(self) -> list[Question]:
        """Raises BenchmarkFileError."""
        rows = source_rows(self.questions)
        references = source_rows(self.references) if self.references is not None else []
        return questions_of(rows, references, self.questions)

    def judge_prompts(self) -> dict[str, BenchPrompt]:
        """Raises BenchmarkFileError or TemplateError."""
        return (
            own_mt_bench_prompts() if self.prompts == OWN else mt_bench_prompts(read_rows(self.prompts), self.prompts)
        )

    def sources(self) -> dict[str, str]:
        """Place of every question file by its key."""
        references = {} if self.references is None else {"references": self.references}
        return {"questions": self.questions, **references}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the questions table. Raises BenchmarkFileError."""
        return [
            question_row(
                "mt_bench",
                q.question_id,
                place,
                q.turns,
                category=q.category,
                references=None if q.references is None else list(q.references),
            )
            for place, q in enumerate(self.load())
        ]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises TemplateError or BenchmarkFileError for unusable judge prompts."""
        self.judge_prompts()

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        """Key of every sampling of a judge, with the judge's key."""
        return {"asking.sampling": (self.judge, self.asking.sampling)}

    def answered(self) -> dict[str, SamplingSettings]:
        """Key of every sampling of the measured models: there is none, the protocol fixes how they answer."""
        return {}

    def judging(self) -> BenchmarkJudging:
        """What the judge needs. Raises BenchmarkFileError or TemplateError."""
        from ray_pipeline.bench.mt_bench.judging import MtBenchJudging

        return MtBenchJudging.part_of(self, prompts=self.judge_prompts())

    def checks(self, inputs: Mapping[str, Stage]) -> list[Stage]:
        """Only models judge."""
        return []

    def scores(self, run: Measurement) -> Scored:
        """Scores of all models from the stored tables."""
        from ray_pipeline.bench.mt_bench.scores import scored

        return scored(self, run)


class MtBenchAnswering(Settings):
    """The settings that decide an answer, beside the model and the seed."""

    answer_tokens: int
    temperatures: dict[str, float]

    def sampling(self, category: str) -> Sampling:
        """Sampling of an answer to a question of this category, without a seed."""
        temperature = self.temperatures.get(category, OTHER_TEMPERATURE)
        return Sampling(temperature=temperature, max_tokens=self.answer_tokens)


def questions_of(
    rows: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]] = (),
    source: str = "MT-Bench questions",
) -> list[Question]:
    """Questions from rows of the published files: question_id, category, turns; references: question_id, choices.

    Raises:
        BenchmarkFileError: a column is missing, an id comes twice, a question has other than two turns, or a question
            of `REFERENCE_CATEGORIES` has no reference although references are given.
    """
    answers: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(references, 1):
        turns = need(row, "choices", "reference answers", number)[0]["turns"]
        answers[need(row, "question_id", "reference answers", number)] = _two(turns, "reference answers", number)
    found: dict[int, Question] = {}
    for number, row in enumerate(rows, 1):
        identifier, category = need(row, "question_id", source, number), need(row, "category", source, number)
        if identifier in found:
            raise BenchmarkFileError(f"{source}: question {identifier} comes twice")
        wanted = category in REFERENCE_CATEGORIES
        if wanted and answers and identifier not in answers:
            raise BenchmarkFileError(f"{source}: question {identifier} ({category}) has no reference answer")
        found[identifier] = Question(
            identifier,
            category,
            _two(need(row, "turns", source, number), source, number),
            answers.get(identifier) if wanted else None,
        )
    return list(found.values())


def _two(turns: Any, source: str, number: int) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) for t in turns):
        raise BenchmarkFileError(f"{source}, row {number}: two turns of text are needed")
    return turns[0], turns[1]


def question_of(row: Mapping[str, Any]) -> Question:
    """MT-Bench's question in a row of the table."""
    references = row["references"]
    return Question(
        int(row["question_id"]),
        row["category"],
        (row["turns"][0], row["turns"][1]),
        None if references is None else (references[0], references[1]),
    )

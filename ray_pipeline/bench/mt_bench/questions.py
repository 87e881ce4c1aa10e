"""MT-Bench's questions: 80 of two turns, and their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.bench.benchmark import CategorySampling, question_row
from ray_pipeline.bench.files import BenchmarkFileError, need

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
#: New tokens of an answer.
ANSWER_TOKENS = 1024
#: Categories that are judged with a reference answer.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: its two turns, and the reference answers where its category has them."""

    question_id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None

    @property
    def temperature(self) -> float:
        return CATEGORY_TEMPERATURES.get(self.category, CategorySampling.other)


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


def question_row_of(question: Question, place: int) -> dict[str, Any]:
    """The row of a question."""
    return question_row(
        question.question_id,
        place,
        question.turns,
        category=question.category,
        references=None if question.references is None else list(question.references),
    )

"""The stored tables of a benchmark run, read once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from ray_pipeline.graph.asking import Row
from ray_pipeline.graph.stage import StageResult


def answers_by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Answers of all models by (benchmark, question_id, model), each list in the order of its turns."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["question_id"], row["model"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["turn"]) for key, rows in found.items()}


def question_key(question: Row, model: str) -> Row:
    """The columns that every answer of a model, and every verdict on one, has."""
    return {**{name: question[name] for name in ("benchmark", "question_id", "prompt_id")}, "model": model}


class Tables:
    """The rows of a run by kind, read once."""

    def __init__(self, results: Mapping[str, StageResult]) -> None:
        self._results = [result for _, result in sorted(results.items())]

    @functools.cache  # noqa: B019 - lives as long as the page is made
    def rows(self, kind: str) -> list[Row]:
        """Empty where no stage with such a table is done."""
        return [row for r in self._results if kind in r.tables for row in r.table(kind).read_all().to_pylist()]

    @functools.cached_property
    def questions(self) -> list[Row]:
        return sorted(self.rows("bench_questions"), key=lambda row: (row["benchmark"], row["position"]))

    @functools.cached_property
    def answers(self) -> dict[tuple[str, str, str], list[Row]]:
        return answers_by_key(self.rows("bench_answers"))

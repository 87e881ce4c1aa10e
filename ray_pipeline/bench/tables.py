"""The stored tables of a benchmark run, read once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.graph.stage import StageResult

Row = dict[str, Any]


def answers_by_key(tables: Sequence[pa.Table]) -> dict[tuple[str, str, str], list[Row]]:
    """Answers of all models by (benchmark, question_id, model), each list in the order of its turns."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for table in tables:
        for row in table.to_pylist():
            found.setdefault((row["benchmark"], row["question_id"], row["model"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["turn"]) for key, rows in found.items()}


def question_key(question: Row, model: str) -> Row:
    """The columns that every verdict on a model's answer has."""
    return {**{name: question[name] for name in ("benchmark", "question_id", "prompt_id")}, "model": model}


class Tables:
    """The rows of a run by kind, read once."""

    def __init__(self, results: Mapping[str, StageResult]) -> None:
        self._results = [result for _, result in sorted(results.items())]

    def rows(self, kind: str) -> list[dict[str, Any]] | None:
        """None where no stage with such a table is done."""
        tables = [r.table(kind).read_all() for r in self._results if kind in r.tables]
        return pa.concat_tables(tables).to_pylist() if tables else None

    @functools.cached_property
    def questions(self) -> list[dict[str, Any]]:
        rows = self.rows("bench_questions") or []
        return sorted(rows, key=lambda row: (row["benchmark"], row["position"]))

    @functools.cached_property
    def answers(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        return answers_by_key(
            [r.table("bench_answers").read_all() for r in self._results if "bench_answers" in r.tables]
        )

    def of(self, benchmark: str) -> list[dict[str, Any]]:
        return [q for q in self.questions if q["benchmark"] == benchmark]

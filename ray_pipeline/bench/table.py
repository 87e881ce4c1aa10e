"""The table of public benchmarks: benchmarks.csv (a row a score), .md and .tex (a row a score, a column a model)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_pipeline.bench.benchmark import Reading, Score
from ray_pipeline.bench.page import Line, benchmarks_page, figure, table_lines, table_rows
from ray_pipeline.report.csv_tables import arrow_csv, as_csv
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.escaping import one_line
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.report.write import write_page

_COLUMNS = (
    "model", "benchmark", "metric", "name", "value", "low", "high", "unit", "rows", "unread", "worst", "best",
    "exact", "departures", "protocol", "note",
)  # fmt: skip


@dataclasses.dataclass
class BenchmarkPage:
    """Everything that the page shows.

    Attributes:
        models: in the order of the columns, floors last.
        facts: lines about the run.
        tables: the benchmarks' own tables by name: rows of plain values, or Arrow tables (in a CSV file alone).
        titles: name of such a table → its title on the page.
        answers: `Page.about`.
    """

    name: str
    models: Sequence[str]
    facts: Mapping[str, str]
    scores: list[Score] = dataclasses.field(default_factory=list)
    readings: list[Reading] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    tables: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    titles: dict[str, str] = dataclasses.field(default_factory=dict)
    answers: Sequence[tuple[str, str]] = ()


def write_benchmarks(page: BenchmarkPage, folder: Path) -> list[Path]:
    """Write the page, benchmarks.json and all tables; returns all paths."""
    document = as_json(_document(page))
    lines = table_lines(document["scores"])
    numbers = {
        "benchmarks.json": document,
        "benchmarks.csv": as_csv(*document["scores"], columns=_COLUMNS),
        "benchmarks.md": markdown_table(["score", *page.models], table_rows(page.models, lines)) + "\n",
        "benchmarks.tex": latex_table(page.models, lines),
    }
    for name, rows in page.tables.items():
        numbers[f"{name}.csv"] = arrow_csv(pa.concat_tables(rows)) if isinstance(rows[0], pa.Table) else as_csv(*rows)
    return write_page(benchmarks_page(document, page.answers), numbers, folder)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))


def latex_table(models: Sequence[str], lines: Sequence[Line]) -> str:
    """A `tabular` for the package booktabs; intervals are 95 %, bounds of unread rows in square brackets."""
    rows = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(models)}}}",
        "\\toprule",
        " & ".join(["score", *(latex_escape(m) for m in models)]) + r" \\",
        "\\midrule",
    ]
    for line in lines:
        name = latex_escape(line.title)
        cells = [latex_escape(figure(line.cells.get(m), to="–")) for m in models]
        rows.append(" & ".join([name, *cells]) + r" \\")
    return "\n".join([*rows, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _flat(score: Score) -> dict[str, Any]:
    row = {name: getattr(score, name) for name in _COLUMNS if hasattr(score, name)}
    return {
        **row,
        "name": score.name.text,
        "exact": score.name.exact,
        "departures": " ".join(score.name.departures),
        "protocol": score.name.fingerprint,
    }


def _document(page: BenchmarkPage) -> dict[str, Any]:
    return {
        "name": page.name,
        "models": page.models,
        "facts": page.facts,
        "warnings": page.warnings,
        "scores": [_flat(s) for s in page.scores],
        "readings": page.readings,
        "protocols": {s.name.fingerprint: s.protocol for s in page.scores},
        "tables": page.titles,
        **{name: page.tables[name] for name in page.titles},
    }

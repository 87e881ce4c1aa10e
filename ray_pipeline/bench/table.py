"""The table of public benchmarks: benchmarks.csv (a row a score), .md and .tex (a row a score, a column a model)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ray_pipeline.bench.page import benchmarks_page
from ray_pipeline.bench.scores import Reading, Score
from ray_pipeline.evaluate.metrics import as_json
from ray_pipeline.report.markdown import inline, render, visible
from ray_pipeline.stats.protocol import fixed_fields

_COLUMNS = (
    "model", "benchmark", "metric", "name", "value", "low", "high", "unit", "rows", "unread", "worst", "best",
    "exact", "departures", "protocol", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BenchmarkPage:
    """Everything that the page shows.

    Attributes:
        models: in the order of the columns, floors last.
        facts: lines about the run.
        categories, types: MT-Bench by category and turn, IFEval by type; rows of plain values.
        instructions: AlpacaEval's per-instruction table over all models, or None.
    """

    name: str
    models: Sequence[str]
    scores: Sequence[Score]
    readings: Sequence[Reading]
    facts: Mapping[str, str]
    warnings: Sequence[str]
    categories: Sequence[Mapping[str, Any]] = ()
    types: Sequence[Mapping[str, Any]] = ()
    instructions: pa.Table | None = None


def write_benchmarks(page: BenchmarkPage, folder: Path) -> Path:
    """All files of the page; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = table_lines(page)
    document = _document(page)
    _write(folder / "benchmarks.json", document)
    _write(folder / "report.html", benchmarks_page(json.loads(document)))
    _write(folder / "benchmarks.csv", _csv([_flat(s) for s in page.scores], _COLUMNS))
    _write(folder / "benchmarks.md", markdown_table(page.models, lines))
    _write(folder / "benchmarks.tex", latex_table(page.models, lines))
    if page.categories:
        _write(folder / "mt_bench_categories.csv", _csv(page.categories, tuple(page.categories[0])))
    if page.types:
        _write(folder / "ifeval_types.csv", _csv(page.types, tuple(page.types[0])))
    if page.instructions is not None:
        pyarrow.csv.write_csv(page.instructions, folder / "alpaca_eval_instructions.csv")
    protocols = {s.name.fingerprint: s for s in page.scores}
    body = render(
        "benchmarks.md.j2",
        {
            "page": page,
            "lines": lines,
            "cell": _cell,
            "protocols": protocols,
            "fields": lambda s: fixed_fields(s.protocol),
        },
    )
    return _write(folder / "report.md", body)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table: a score under one protocol, with each model's figure (None: it has none of it)."""

    name: str
    metric: str
    unit: str
    fingerprint: str
    cells: Mapping[str, Score]


def table_lines(page: BenchmarkPage) -> list[Line]:
    """Scores by protocol: two models stand in one row only if they were measured alike in everything."""
    found: dict[tuple[str, str, str], dict[str, Score]] = {}
    for score in page.scores:
        found.setdefault((score.benchmark, score.metric, score.name.fingerprint), {})[score.model] = score
    lines = []
    for (_, metric, fingerprint), cells in found.items():
        first = next(iter(cells.values()))
        lines.append(Line(first.name.text, metric, first.unit, fingerprint, cells))
    order = list(dict.fromkeys((s.benchmark, s.metric) for s in page.scores))
    return sorted(lines, key=lambda line: order.index(_of(line)))


def _of(line: Line) -> tuple[str, str]:
    first = next(iter(line.cells.values()))
    return first.benchmark, first.metric


def figure(score: Score | None, dash: str = "–", to: str = " to ") -> str:
    """`7.21 (6.90 to 7.52)`; bounds of what unread rows could have made of it behind it; a dash for nothing."""
    if score is None or score.value is None:
        return dash
    digits = 2 if score.unit == "1–10" else 1
    text = f"{score.value:.{digits}f}"
    if score.low is not None and score.high is not None:
        text += f" ({score.low:.{digits}f}{to}{score.high:.{digits}f})"
    if score.unread and score.worst is not None and score.best is not None and score.worst < score.best:
        text += f" [{score.worst:.{digits}f}{to}{score.best:.{digits}f}]"
    return text


def _cell(line: Line, model: str) -> str:
    return figure(line.cells.get(model))


def markdown_table(models: Sequence[str], lines: Sequence[Line]) -> str:
    """The table alone, for pasting."""
    rows = [f"| score | {' | '.join(inline(m) for m in models)} |", f"|---|{'---:|' * len(models)}"]
    for line in lines:
        cells = " | ".join(inline(_cell(line, m)) for m in models)
        rows.append(f"| {inline(f'{line.name}: {line.metric} ({line.unit})')} | {cells} |")
    return "\n".join(rows) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is, on one line."""
    return "".join(_LATEX.get(c, c) for c in " ".join(visible(text).split()))


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
        name = latex_escape(f"{line.name}: {line.metric} ({line.unit})")
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


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _document(page: BenchmarkPage) -> str:
    document = {
        "name": page.name,
        "models": list(page.models),
        "facts": dict(page.facts),
        "warnings": list(page.warnings),
        "scores": [_flat(s) for s in page.scores],
        "readings": [dataclasses.asdict(r) for r in page.readings],
        "protocols": {s.name.fingerprint: dataclasses.asdict(s.protocol) for s in page.scores},
        "mt_bench_categories": list(page.categories),
        "ifeval_types": list(page.types),
    }
    return json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path

"""Public benchmarks on a page: the scores of benchmarks.json as a table and as dots with intervals.

A score is a mapping with model, benchmark, metric, name (what it may be called), value, low, high, unit, rows, unread,
worst, best, protocol (fingerprint) and note: a row of benchmarks.csv, or an entry of `scores` in benchmarks.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.report.charts import Chart, Dot, dots
from ray_pipeline.report.markdown import number
from ray_pipeline.report.page import Block, Cell, Page, Section, Table, Text, panels, render_page
from ray_pipeline.stats.bootstrap import Interval

_COLOURS = ("blue", "orange", "green", "purple", "vermilion", "grey")
#: Ends of the axis by unit.
_ENDS = {"%": (0.0, 100.0), "1–10": (1.0, 10.0)}
_Rows = list[list[str | Cell]]


def benchmarks_page(document: Mapping[str, Any]) -> str:
    """The page of benchmarks.json as HTML."""
    sections = [Section("scores", "Scores", benchmark_blocks(document["scores"]))]
    for key, title in (("mt_bench_categories", "MT-Bench by category"), ("ifeval_types", "IFEval by type")):
        if document.get(key):
            sections.append(Section(key, title, [_plain_table(document[key])]))
    if document.get("readings"):
        sections.append(Section("readings", "How replies were read", [_plain_table(document["readings"])]))
    protocols = [
        [name, ", ".join(f"{field} {value}" for field, value in protocol.items() if value)]
        for name, protocol in (document.get("protocols") or {}).items()
    ]
    if protocols:
        table = Table(["fingerprint", "what it fixes"], protocols, text_columns=2)
        sections.append(Section("protocols", "Protocols", [table]))
    facts: _Rows = [[name, str(text)] for name, text in (document.get("facts") or {}).items()]
    if facts:
        sections.append(Section("facts", "How it was measured", [Table(["", ""], facts, text_columns=2)]))
    models, measured = document["models"], {score["benchmark"] for score in document["scores"]}
    return render_page(
        Page(
            title=document["name"],
            subtitle="Quorum, public benchmarks",
            headline=f"{len(models)} models on {len(measured)} benchmarks. Only scores of one protocol compare.",
            warnings=document.get("warnings") or (),
            sections=sections,
        )
    )


def benchmark_blocks(scores: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Charts, a chart a benchmark and unit, and the table of all scores."""
    models = list(dict.fromkeys(score["model"] for score in scores))
    colours = {model: _COLOURS[i % len(_COLOURS)] for i, model in enumerate(models)}
    rows: _Rows = [
        [
            score["name"],
            score["metric"],
            score["model"],
            score.get("protocol") or "",
            number(score["value"]),
            _pair(score.get("low"), score.get("high")),
            score["unit"],
            number(score["rows"]),
            number(score["unread"]),
            _pair(score.get("worst"), score.get("best")) if score["unread"] else "–",
            score.get("note") or "",
        ]
        for score in scores
    ]
    columns = ["score", "metric", "model", "protocol", "value", "95 %", "unit", "rows", "unread", "bounds", "note"]
    said = (
        "A score has a benchmark's own name only where its protocol matches the published one exactly. Bounds are the "
        "value had all unread rows been the worst or the best."
    )
    return [*panels(*_charts(scores, colours)), Table(columns, rows, text_columns=4), Text(said)]


def _charts(scores: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[Chart | None]:
    groups: dict[tuple[str, str], dict[str, list[Dot]]] = {}
    for score in scores:
        if score["value"] is not None:
            estimate = Interval(score["value"], score.get("low"), score.get("high"))
            found = groups.setdefault((score["benchmark"], score["unit"]), {})
            found.setdefault(score["metric"], []).append(Dot(score["model"], colours[score["model"]], estimate))
    charts = []
    for (benchmark, unit), by_metric in groups.items():
        values = [dot.estimate.mean or 0.0 for found in by_metric.values() for dot in found]
        ends = _ENDS.get(unit) or (min([0.0, *values]), max(values) or 1.0)
        charts.append(dots(f"{benchmark}, {unit}", list(by_metric.items()), ends, shares=False))
    return charts


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of plain values: words first, as they come."""
    columns = list(rows[0])
    words = next((i for i, name in enumerate(columns) if not isinstance(rows[0][name], str)), len(columns))
    cells: _Rows = [[_value(row.get(name)) for name in columns] for row in rows]
    return Table([name.replace("_", " ") for name in columns], cells, text_columns=max(1, words))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)


def _pair(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.2f} to {high:.2f}"

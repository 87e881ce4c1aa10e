"""Public benchmarks on a page: the scores of benchmarks.json as charts, as a table of models, and one by one.

A score is a mapping with model, benchmark, metric, name (what it may be called), value, low, high, unit, rows, unread,
worst, best, exact, departures, protocol (fingerprint) and note: a row of benchmarks.csv, or an entry of `scores` in
benchmarks.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_pipeline.report.charts import Chart, Dot, dots
from ray_pipeline.report.figures import NONE, number, span
from ray_pipeline.report.page import Block, Page, Rows, Section, Table, Text, facts, panels
from ray_pipeline.stats.bootstrap import Interval

_COLOURS = ("blue", "orange", "green", "purple", "vermilion", "grey")
#: Ends of the axis by unit.
_ENDS = {"%": (0.0, 100.0), "1–10": (1.0, 10.0)}


def benchmarks_page(document: Mapping[str, Any], answers: Sequence[tuple[str, str]] = ()) -> Page:
    """The page of benchmarks.json; `answers` are its `about`."""
    scores = document["scores"]
    sections = [Section("scores", "Scores", benchmark_blocks(scores))]
    for key, title in {"readings": "How answers were read", **document.get("tables", {})}.items():
        if document.get(key):
            sections.append(Section(key, title, [_plain_table(document[key])]))
    if document.get("protocols"):
        sections.append(Section("protocols", "Protocols", [_protocols(document["protocols"], scores)]))
    if document.get("facts"):
        values = {name: str(text) for name, text in document["facts"].items()}
        sections.append(Section("facts", "The run", facts(values)))
    measured = {score["benchmark"] for score in scores}
    best = "".join(f" {text}." for text in _best(scores))
    return Page(
        title=document["name"],
        subtitle="Quorum, public benchmarks. The same table: benchmarks.csv, benchmarks.md, benchmarks.tex.",
        headline=(
            f"{len(document['models'])} models on {len(measured)} benchmarks.{best} Only scores of one protocol "
            "are comparable."
        ),
        about=answers,
        warnings=document.get("warnings") or (),
        sections=sections,
    )


def _best(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The highest score of the first metric of each benchmark, where several models have one of the same protocol."""
    first: dict[str, tuple[str, str]] = {}
    for score in scores:
        first.setdefault(score["benchmark"], (score["metric"], score.get("protocol") or ""))
    for benchmark, (metric, protocol) in first.items():
        same = [
            score
            for score in scores
            if (score["benchmark"], score["metric"], score.get("protocol") or "") == (benchmark, metric, protocol)
            and score["value"] is not None
        ]
        if len(same) > 1:
            best = max(same, key=lambda score: score["value"])
            yield f"Highest {best['name']} ({metric}): {best['model']}, {figure(best)}"


def benchmark_blocks(scores: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Charts, one per benchmark and unit, the table of models, and the table of all scores."""
    models = list(dict.fromkeys(score["model"] for score in scores))
    colours = {model: _COLOURS[i % len(_COLOURS)] for i, model in enumerate(models)}
    rows: Rows = [
        [
            score["name"],
            score["metric"],
            score["model"],
            score.get("protocol") or "",
            number(score["value"]),
            span(score.get("low"), score.get("high")),
            score["unit"],
            number(score["rows"]),
            number(score["unread"]),
            span(score.get("worst"), score.get("best")) if score["unread"] else NONE,
            score.get("note") or "",
        ]
        for score in scores
    ]
    columns = ["score", "metric", "model", "protocol", "value", "95 %", "unit", "rows", "unread", "bounds", "note"]
    text = (
        "Round brackets: 95 % intervals. Square brackets, bounds: what the score could have been if everything unread "
        "had been the worst or the best. Each row has one protocol; models measured otherwise have a row of their own. "
        "A score has a benchmark's own name only where its protocol matches the published one exactly."
    )
    return [
        *panels(*_charts(scores, colours)),
        Table(["score", *models], table_rows(models, table_lines(scores))),
        Text(text),
        Table(columns, rows, text_columns=4, title="Every score"),
    ]


@dataclass(frozen=True)
class Line:
    """One row of the table of models: a score under one protocol, by model (None: it has none of it)."""

    title: str
    cells: Mapping[str, Mapping[str, Any]]


def table_lines(scores: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Scores by protocol: two models share a row only if they were measured identically."""
    found: dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for score in scores:
        by_protocol = found.setdefault((score["benchmark"], score["metric"]), {})
        by_protocol.setdefault(score.get("protocol") or "", {})[score["model"]] = score
    lines = []
    for by_protocol in found.values():
        for cells in by_protocol.values():
            first = next(iter(cells.values()))
            lines.append(Line(f"{first['name']}: {first['metric']} ({first['unit']})", cells))
    return lines


def table_rows(models: Sequence[str], lines: Sequence[Line]) -> Rows:
    """The table of models as text."""
    return [[line.title, *(figure(line.cells.get(model)) for model in models)] for line in lines]


def figure(score: Mapping[str, Any] | None, to: str = " to ") -> str:
    """`7.21 (6.90 to 7.52)`; bounds of what unread rows could have made of it behind it; a dash for nothing."""
    if score is None or score["value"] is None:
        return NONE
    digits = 2 if score["unit"] == "1–10" else 1
    text = f"{score['value']:.{digits}f}"
    low, high, worst, best = (score.get(key) for key in ("low", "high", "worst", "best"))
    if low is not None and high is not None:
        text += f" ({low:.{digits}f}{to}{high:.{digits}f})"
    if score["unread"] and worst is not None and best is not None and worst < best:
        text += f" [{worst:.{digits}f}{to}{best:.{digits}f}]"
    return text


def _protocols(protocols: Mapping[str, Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Table:
    named = {score.get("protocol"): score for score in scores}
    rows: Rows = []
    for fingerprint, protocol in protocols.items():
        score = named.get(fingerprint, {})
        departures = ", ".join((score.get("departures") or "").split())
        rows.append(
            [
                fingerprint,
                score.get("name", ""),
                f"not the published {departures}" if departures else "the published protocol",
                "; ".join(f"{field} {value}" for field, value in protocol.items() if value),
            ]
        )
    columns = ["protocol", "name of its scores", "departures", "what it fixes"]
    return Table(columns, rows, text_columns=4, title="What each protocol fixes", folded=True)


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


#: Columns of benchmarks.json that the page calls otherwise.
_TITLES = {
    "statuses": "replies by status",
    "contradictory": "two verdicts",
    "flip_rate": "order flips",
    "mean_chars": "mean characters",
    "chance": "hang on a random draw",
    "total": "instructions",
    "name": "type",
    "value": "mean",
}


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of plain values, columns of words first."""
    columns = list(rows[0])
    words = next((i for i, name in enumerate(columns) if not isinstance(rows[0][name], (str, Mapping))), len(columns))
    cells: Rows = [[_value(row.get(name), name) for name in columns] for row in rows]
    titles = [_TITLES.get(name, name.replace("_", " ")) for name in columns]
    return Table(titles, cells, text_columns=max(1, words))


def _value(value: Any, column: str) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item:,}" for key, item in value.items())
    if isinstance(value, (int, float)) and column == "flip_rate":
        return f"{100 * value:.1f} %"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)

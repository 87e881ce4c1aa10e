"""Two runs side by side: differences in configuration and in results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_pipeline.report.charts import Bins, Chart, Dot, dots, histogram
from ray_pipeline.report.figures import NONE
from ray_pipeline.report.html import render_html
from ray_pipeline.report.page import Cell, Page, Rows, Section, Table, panels
from ray_pipeline.stats.bootstrap import Interval

#: Colours of the first and the second run.
_COLOURS = ("blue", "vermilion")
_USE = {
    "calls_engine": "calls made",
    "calls_log": "calls from the log",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "new tokens",
    "cached_tokens": "cached tokens",
    "wall_seconds": "seconds",
    "cost": "cost",
}


@dataclass(frozen=True)
class Side:
    """One run: its configuration, fingerprint and usage of each finished stage, and the numbers of its report
    (metrics.json, agreement.json, judge_card.json, winrate.json or benchmarks.json).
    """

    name: str
    folder: str
    workflow: str
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    usage: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line: both sides as text ("–": no value), and the difference of numbers."""

    name: str
    a: str
    b: str
    difference: str = ""

    @property
    def differs(self) -> bool:
        return self.a != self.b


Kind = Literal["config", "stages", "counts", "scores", "agreement", "rates", "cost"]


@dataclass(frozen=True)
class Part:
    kind: Kind
    title: str
    rows: Sequence[Row]


def side_by_side(a: Side, b: Side) -> list[Part]:
    """All parts with rows, in the order of the pipeline. Stages with equal fingerprints are the same.

    Raises:
        ValueError: the runs are of different workflows, which share no figures.
    """
    if a.workflow != b.workflow:
        raise ValueError(
            f"{a.folder} is a run of {a.workflow}, but {b.folder} is a run of {b.workflow}; choose runs of one workflow"
        )
    stages = _stages(a, b)
    same = sum(not row.differs for row in stages)
    parts = [
        Part("config", "Configuration that differs", _config(a.config, b.config)),
        Part("stages", f"Stages that differ ({same} are the same)", [row for row in stages if row.differs]),
        Part("counts", "Counts", _numbers(a, b, _counts, 0)),
        Part("scores", "Scores", _numbers(a, b, _scores, 2)),
        Part("agreement", "Agreement", _estimates(a, b, _agreement, 3)),
        Part("rates", "Win rates and accuracy, %", _estimates(a, b, _rates, 1)),
        Part("cost", "Cost", _numbers(a, b, _costs, 1)),
    ]
    return [part for part in parts if part.rows]


def compare_page(a: Side, b: Side) -> str:
    """The parts as one HTML page, with the charts of both runs overlaid."""
    parts = side_by_side(a, b)
    names = _names(a, b)
    changed = sum(len(part.rows) for part in parts if part.kind == "config")
    stages = _stages(a, b)
    same = sum(not row.differs for row in stages)
    return render_html(
        Page(
            title=f"{names[0]} and {names[1]}",
            subtitle=f"Quorum, two runs of {a.workflow} side by side: {a.folder} and {b.folder}",
            headline=(
                f"Keys of the configuration that differ: {changed}; {same} of {len(stages)} stages are the same. "
                "Differences are the second run minus the first."
            ),
            sections=[
                Section(part.kind, part.title, [*panels(*_charts(part.kind, a, b, names)), _table(part, names)])
                for part in parts
            ],
        )
    )


def _table(part: Part, names: tuple[str, str]) -> Table:
    """A part as a table; configuration and fingerprints are text and have no difference column."""
    words = part.kind in ("config", "stages")
    rows: Rows = []
    for row in part.rows:
        cells: list[str | Cell] = [row.name, row.a, Cell(row.b, tone="changed" if row.differs else "")]
        rows.append(cells if words else [*cells, row.difference])
    if words:
        return Table(["key" if part.kind == "config" else "stage", *names], rows, text_columns=3)
    return Table(["", *names, "difference"], rows)


def _names(a: Side, b: Side) -> tuple[str, str]:
    """Runs of the same name are distinguished by their folders."""
    return (a.name, b.name) if a.name != b.name else (a.folder, b.folder)


# --- parts ------------------------------------------------------------------------------------------------------------


def _config(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    one, other = dict(_flat(a)), dict(_flat(b))
    keys = [*one, *(key for key in other if key not in one)]
    rows = (Row(key, one.get(key, NONE), other.get(key, NONE)) for key in keys)
    return [row for row in rows if row.differs]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key → value as text; list entries by their `name`, else by their index."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list)) for item in value):
        for place, item in enumerate(value):
            name = item.get("name") if isinstance(item, Mapping) else None
            yield from _flat(item, f"{path}[{name or place}]")
    else:
        yield path, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _stages(a: Side, b: Side) -> list[Row]:
    """All stages of the two runs; equal fingerprints mean the same stage."""
    names = [*a.fingerprints, *(name for name in b.fingerprints if name not in a.fingerprints)]
    return [Row(name, a.fingerprints.get(name, NONE), b.fingerprints.get(name, NONE)) for name in names]


def _counts(side: Side) -> Iterator[tuple[str, float | None]]:
    metrics = side.metrics
    for step in metrics.get("funnel") or ():
        yield f"{step['name']}, {step['note']}" if step["note"] else step["name"], step["rows"]
    yield "items", metrics.get("items")
    yield "items with a human label", metrics.get("labelled")
    for method in metrics.get("methods") or ():
        yield f"{_method(method)}: rows", method["rows"]


def _scores(side: Side) -> Iterator[tuple[str, float | None]]:
    judging, gate = side.metrics.get("judging"), side.metrics.get("gate")
    for judge, stats in (judging["judges"] if judging else {}).items():
        yield f"{judge}: mean", stats["score"]["mean"]
        yield f"{judge}: sd", stats["score"]["sd"]
    for basis, panel in _panels(side):
        yield f"effective judges ({basis})", panel["effective"]["mean"]
    if gate:
        yield "kept by the gate, %", None if gate["acceptance"] is None else 100 * gate["acceptance"]
        yield "desirable: mean final score", gate["desirable"]["mean"]
        yield "undesirable: mean final score", gate["undesirable"]["mean"]
        yield "gap of the two", gate["gap"]
        for label, stats in gate["labels"].items():
            yield f"{label}: mean characters", stats["chars"]["mean"]
    evaluation = side.metrics.get("evaluation")
    for rubric in evaluation["rubrics"] if evaluation else ():
        yield f"{rubric['judge']}, {rubric['mode']}: policy", rubric["policy"]["mean"]
        yield f"{rubric['judge']}, {rubric['mode']}: base", rubric["base"]["mean"]
    for model, found in (evaluation["perplexity"] if evaluation else {}).items():
        yield f"perplexity, {model}", found["ppl"]
    for method in side.metrics.get("methods") or ():
        yield f"{_method(method)}: mean score", (method["mean_score"] or {}).get("mean")


def _agreement(side: Side) -> Iterator[tuple[str, Interval]]:
    """Kappas of judge pairs of a run, or of judges with humans."""
    judging = side.metrics.get("judging")
    if judging:
        bounds = {(i["judge_a"], i["judge_b"]): i for i in side.metrics.get("kappa_intervals") or ()}
        for pair in judging["kappas"]:
            found = bounds.get((pair["judge_a"], pair["judge_b"]), {})
            yield (
                f"kappa {pair['judge_a']}, {pair['judge_b']}",
                Interval(pair["value"], found.get("low"), found.get("high")),
            )
        yield "Krippendorff's alpha", Interval(judging["alpha"], None, None)
    for basis, panel in _panels(side):
        yield f"correlation of errors ({basis})", Interval(*(panel["correlation"][b] for b in ("mean", "low", "high")))
    if side.workflow == "agreement":
        for judge in side.metrics.get("judges") or ():
            yield f"kappa {judge['judge']} ({judge['strategy']})", Interval(judge["kappa"], *judge["kappa_interval"])


def _panels(side: Side) -> list[tuple[str, Mapping[str, Any]]]:
    """Errors of the judges by their basis; none in a report of before they were measured."""
    found = side.metrics.get("judge_errors") or {}
    return [(basis, found[basis]) for basis in ("truth", "estimate") if found.get(basis)]


def _rates(side: Side) -> Iterator[tuple[str, Interval]]:
    evaluation = side.metrics.get("evaluation")
    for rate in evaluation["win_rates"] if evaluation else ():
        yield f"score against base, {rate['judge']}", _percent(rate["score"])
        yield f"flips, {rate['judge']}", _percent({"mean": rate["flip_rate"]})
    for found in evaluation["responses"] if evaluation else ():
        if found["accuracy"]:
            yield f"true accuracy, {found['model']}, {found['mode']}", _percent(found["accuracy"])
    for method in side.metrics.get("methods") or ():
        if method["win_rate"]:
            bounds = method["win_interval"]
            yield f"{_method(method)}: wins", _percent({**bounds, "mean": method["win_rate"]["mean"]})
        for mode, share in method["accuracy"].items():
            yield f"{_method(method)}: right, {mode}", _percent({"mean": share["mean"] if share else None})
    for score in side.metrics.get("scores") or ():
        name = f"{score['model']}: {score['name']}, {score['metric']} ({score['unit']})"
        yield name, Interval(score["value"], score["low"], score["high"])
    if side.workflow == "judge_check":
        for judge in side.metrics.get("judges") or ():
            for score in judge["scores"]:
                yield f"{judge['facts']['judge']}: {score['title']}", _percent(score["share"])
    for run in side.metrics.get("runs") or ():
        rate = run["win_rate"]
        yield run["run"], Interval(rate["value"], rate["low"], rate["high"])


def _costs(side: Side) -> Iterator[tuple[str, float | None]]:
    for key, name in _USE.items():
        known = [usage[key] for usage in side.usage.values() if key in usage]
        if known and (sum(known) or key != "cost"):
            yield f"all stages: {name}", sum(known)
    for stage, usage in side.usage.items():
        if usage.get("calls_engine") or usage.get("calls_log"):
            yield f"{stage}: calls made", usage["calls_engine"]
            yield f"{stage}: new tokens", usage.get("completion_tokens")
        yield f"{stage}: seconds", usage.get("wall_seconds")


# --- rows and charts --------------------------------------------------------------------------------------------------


def _numbers(a: Side, b: Side, of: Callable[[Side], Iterator[tuple[str, float | None]]], digits: int) -> list[Row]:
    one, other = dict(of(a)), dict(of(b))
    rows = []
    for name in [*one, *(name for name in other if name not in one)]:
        x, y = one.get(name), other.get(name)
        if x is not None or y is not None:
            shown = 1 if digits == 1 and not (_whole(x) and _whole(y)) else 0 if digits == 1 else digits
            gap = "" if x is None or y is None else f"{y - x:+,.{shown}f}"
            rows.append(Row(name, _figure(x, shown), _figure(y, shown), gap))
    return rows


def _whole(value: float | None) -> bool:
    return value is None or float(value).is_integer()


def _estimates(a: Side, b: Side, of: Callable[[Side], Iterator[tuple[str, Interval]]], digits: int) -> list[Row]:
    one, other = dict(of(a)), dict(of(b))
    nothing = Interval(None, None, None)
    rows = []
    for name in [*one, *(name for name in other if name not in one)]:
        x, y = one.get(name, nothing), other.get(name, nothing)
        if x.mean is not None or y.mean is not None:
            gap = "" if x.mean is None or y.mean is None else f"{y.mean - x.mean:+.{digits}f}"
            rows.append(Row(name, _interval(x, digits), _interval(y, digits), gap))
    return rows


def _interval(estimate: Interval, digits: int) -> str:
    text = _figure(estimate.mean, digits)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _figure(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _percent(found: Mapping[str, Any]) -> Interval:
    low, high, mean = (found.get(key) for key in ("low", "high", "mean"))
    mean, low, high = (None if value is None else 100 * value for value in (mean, low, high))
    return Interval(mean, low, high)


def _method(method: Mapping[str, Any]) -> str:
    return f"{method['method']} on {method['data']}"


def _charts(kind: Kind, a: Side, b: Side, names: tuple[str, str]) -> list[Chart | None]:
    if kind == "scores":
        judges = [(side.metrics.get("judging") or {}).get("judges", {}) for side in (a, b)]
        shared = [judge for judge in judges[0] if judge in judges[1]]
        return [
            histogram(
                judge,
                [_bins(name, colour, found[judge]["histogram"]) for name, colour, found in _sides(names, judges)],
                "score",
                shares=True,
            )
            for judge in shared
        ]
    if kind not in ("agreement", "rates"):
        return []
    of = _agreement if kind == "agreement" else _rates
    found = [dict(of(side)) for side in (a, b)]
    rows = [
        (key, [Dot(name, colour, values[key]) for name, colour, values in _sides(names, found) if key in values])
        for key in dict.fromkeys(key for values in found for key in values)
    ]
    if kind == "agreement":
        means = [dot.estimate.mean for _, own in rows for dot in own if dot.estimate.mean is not None]
        lows = [dot.estimate.low for _, own in rows for dot in own if dot.estimate.low is not None]
        return [dots("Agreement", rows[:24], (min([0.0, *means, *lows]), 1.0), shares=False)]
    return [dots("Win rates and accuracy, %", rows[:24], (0.0, 100.0), shares=False)]


def _sides(names: tuple[str, str], found: Sequence[Any]) -> list[tuple[str, str, Any]]:
    return list(zip(names, _COLOURS, found, strict=True))


def _bins(name: str, colour: str, counts: Mapping[str, int]) -> Bins:
    """Integer scores as bins of width one."""
    by_score = {int(score): count for score, count in counts.items()}
    low, high = min([1, *by_score]), max([10, *by_score])
    edges = [score - 0.5 for score in range(low, high + 2)]
    return Bins(name, colour, edges, [by_score.get(score, 0) for score in range(low, high + 1)])

"""The pictures of the report. Colours are Okabe & Ito's (2008), told apart with any colour vision; numbers are written
beside the bars, so that no plot needs its colours to be read.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ray_pipeline.data.gate_stats import GateStats
from ray_pipeline.data.judge_stats import JudgingStats
from ray_pipeline.evaluate.metrics import Evaluation, RunMetrics
from ray_pipeline.evaluate.training_curve import curve
from ray_pipeline.report.markdown import visible
from ray_pipeline.stats.bootstrap import Interval

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999999"
LABEL_COLOURS = {
    "desirable": BLUE,
    "undesirable": VERMILION,
    "discard": GREY,
    "abstain": PURPLE,
    "incomplete": ORANGE,
}
MODEL_COLOURS = {"base": GREY, "policy": BLUE}
CURVES = {"loss": "loss", "rewards_margins": "reward margin (chosen − rejected)", "kl": "KL to the reference"}
_TITLE_ABOVE_LEGEND = 30  # points: two lines of legend
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same pixels on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "figure.dpi": 120,
    "text.parse_math": False,  # a judge named "$\frac" is a name, not a formula
}


def draw_plots(metrics: RunMetrics, train_metrics: pa.Table | None, folder: Path) -> dict[str, Path]:
    """Draw every plot that there are numbers for into `folder`; name → file."""
    figures: dict[str, Callable[[], Figure | None]] = {
        "labels": lambda: None if metrics.gate is None else _labels(metrics.gate),
        "scores": lambda: None if metrics.judging is None else _scores(metrics.judging),
        "training": lambda: None if train_metrics is None else _training(train_metrics),
        "base_vs_policy": lambda: None if metrics.evaluation is None else _base_vs_policy(metrics.evaluation),
    }
    return save_figures(figures, folder)


def save_figures(figures: Mapping[str, Callable[[], Figure | None]], folder: Path) -> dict[str, Path]:
    """Draw each figure in the style of the report and save it as `folder`/NAME.png; name → file of those there are."""
    drawn: dict[str, Path] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(_STYLE)
        for name, draw in figures.items():
            figure = draw()
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                drawn[name] = folder / f"{name}.png"
                # Without Software the file does not name the version of matplotlib; a date is never written.
                figure.savefig(drawn[name], metadata={"Software": None})
                figure.clear()
    return drawn


def _labels(gate: GateStats) -> Figure | None:
    if not gate.rows:
        return None
    figure, (axes,) = row_of_axes(1, width=6.4, height=2.5)
    names = list(gate.labels)[::-1]
    counts = [gate.labels[name].count for name in names]
    bars = axes.barh(names, counts, color=[LABEL_COLOURS[name] for name in names])
    axes.bar_label(bars, [f"{n:,} ({n / gate.rows:.1%})" for n in counts], padding=3)
    axes.set_xlim(0, max(counts) * 1.22)
    axes.set_xlabel("candidates")
    axes.set_title("What the gate decided")
    _whole_numbers(axes, "x")
    axes.grid(visible=False, axis="y")
    return figure


def _scores(judging: JudgingStats) -> Figure | None:
    judges = {name: stats for name, stats in judging.judges.items() if stats.read}
    if not judges:
        return None
    figure, panels = _grid_of_axes(len(judges), width=2.9, height=2.4)
    lowest = min([1, *(min(stats.histogram) for stats in judges.values())])
    highest = max([10, *(max(stats.histogram) for stats in judges.values())])
    most = max(max(stats.histogram.values()) for stats in judges.values())
    for axes, (name, stats) in zip(panels, judges.items(), strict=True):
        axes.bar(list(stats.histogram), list(stats.histogram.values()), width=0.85, color=BLUE)
        axes.set_xlim(lowest - 0.6, highest + 0.6)
        axes.set_ylim(0, most * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        _whole_numbers(axes, "y")
        unread = f", {stats.unread} unread" if stats.unread else ""
        axes.set_title(f"{short(name)}\nmean {stats.score.mean:.2f}{unread}")
        axes.set_xlabel("score")
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel("verdicts")
    return figure


def _training(train_metrics: pa.Table) -> Figure | None:
    shown = {}
    for measure, title in CURVES.items():
        parts = [curve(train_metrics, measure, train=train) for train in (True, False)]
        if any(len(values) for _, values in parts):
            shown[title] = parts
    if not shown:
        return None
    figure, panels = row_of_axes(len(shown), width=3.2 * len(shown), height=2.6)
    for axes, (title, (train, validation)) in zip(panels, shown.items(), strict=True):
        if len(train[0]):
            # A run of a few steps is a few points: without markers a single one would not show at all.
            axes.plot(*train, color=BLUE, linewidth=1.3, marker="o" if len(train[0]) < 30 else "", ms=3, label="train")
        if len(validation[0]):
            axes.plot(*validation, color=VERMILION, linestyle="--", marker="s", markersize=4, label="validation")
            axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        _whole_numbers(axes, "x")
    return figure


def _base_vs_policy(evaluation: Evaluation) -> Figure | None:
    draws: list[Callable[[Axes], None]] = []
    if any(rate.decided for rate in evaluation.win_rates):
        draws.append(lambda axes: _draw_win_rates(axes, evaluation))
    accuracy = {
        r.mode: {s.model: s.accuracy for s in evaluation.responses if s.mode == r.mode and s.accuracy}
        for r in evaluation.responses
    }
    if any(accuracy.values()):
        draws.append(lambda axes: _draw_models(axes, {k: v for k, v in accuracy.items() if v}, "true accuracy", 1.0))
    rubrics = {
        _rubric_name(r.judge, r.mode, evaluation): {"base": r.base, "policy": r.policy} for r in evaluation.rubrics
    }
    if any(interval.mean is not None for pair in rubrics.values() for interval in pair.values()):
        draws.append(lambda axes: _draw_models(axes, rubrics, "mean rubric score", 10.0))
    if not draws:
        return None
    figure, panels = row_of_axes(len(draws), width=max(4.0, 3.7 * len(draws)), height=3.2)
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes)
    return figure


def _rubric_name(judge: str, mode: str, evaluation: Evaluation) -> str:
    several = len({r.mode for r in evaluation.rubrics}) > 1
    return f"{judge}\n{mode}" if several else judge


def _draw_win_rates(axes: Axes, evaluation: Evaluation) -> None:
    """One stacked bar per judge: policy wins, ties, base wins; the dot is the score with its interval."""
    rates = [rate for rate in evaluation.win_rates if rate.decided]
    left = [0.0] * len(rates)
    rows = range(len(rates))
    parts = (("policy wins", "win_rate", BLUE), ("tie", "tie_rate", "#d9d9d9"), ("base wins", "loss_rate", VERMILION))
    for label, share_of, colour in parts:
        shares = [getattr(rate, share_of) for rate in rates]
        bars = axes.barh(rows, shares, left=left, color=colour, label=label, height=0.45)
        # A share of less than 8 % has no room for its number.
        texts = [f"{share:.0%}" if share >= 0.08 else "" for share in shares]
        axes.bar_label(bars, texts, label_type="center", color="black" if label == "tie" else "white", fontsize=8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for row, rate in zip(rows, rates, strict=True):
        # Above the bar, where it covers none of the numbers.
        _draw_interval(axes, rate.score, row + 0.33, vertical=False)
    axes.plot([], [], "o-", color="black", ms=4, linewidth=1.2, label="score, 95 %")
    axes.axvline(0.5, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(list(rows), [short(rate.judge, 18) for rate in rates])
    axes.set_ylim(-0.5, len(rates) - 0.3)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("pairwise, both orders", pad=_TITLE_ABOVE_LEGEND)
    axes.grid(visible=False)
    _legend_above(axes)


def _draw_models(axes: Axes, by_group: dict[str, dict[str, Interval]], title: str, top: float) -> None:
    """Grouped bars base / policy with intervals; `top` is the end of the scale (1 for shares)."""
    width = 0.36
    for offset, model in ((-width / 2, "base"), (width / 2, "policy")):
        for i, intervals in enumerate(by_group.values()):
            interval = intervals.get(model)
            if interval is None or interval.mean is None:
                continue
            label = model if model not in axes.get_legend_handles_labels()[1] else None
            axes.bar(i + offset, interval.mean, width * 0.94, color=MODEL_COLOURS[model], label=label)
            _draw_interval(axes, interval, i + offset, vertical=True)
            above = interval.high if interval.high is not None else interval.mean
            text = f"{interval.mean:.0%}" if top == 1.0 else f"{interval.mean:.1f}"
            axes.annotate(text, (i + offset, above), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(by_group)), [short(name, 16) for name in by_group])
    if len(by_group) > 3:
        axes.tick_params(axis="x", labelrotation=20)
    axes.set_xlim(-0.6, len(by_group) - 0.4)
    axes.set_ylim(0, top * 1.12)
    axes.set_yticks([top * i / 5 for i in range(6)])
    if top == 1.0:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(title, pad=_TITLE_ABOVE_LEGEND)
    axes.grid(visible=False, axis="x")
    _legend_above(axes)


def _draw_interval(axes: Axes, interval: Interval, place: float, *, vertical: bool) -> None:
    if interval.mean is None:
        return
    error = None
    if interval.low is not None and interval.high is not None:
        # Rounding can put the mean outside its own interval by one bit, and matplotlib refuses negative errors.
        error = [[max(0.0, interval.mean - interval.low)], [max(0.0, interval.high - interval.mean)]]
    style: dict[str, Any] = {"color": "black", "capsize": 2.5, "linewidth": 1.2}
    if vertical:
        axes.errorbar([place], [interval.mean], yerr=error, fmt="none", **style)
    else:
        axes.errorbar([interval.mean], [place], xerr=error, fmt="o", markersize=4, **style)


def row_of_axes(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure outside pyplot's registry: nothing to close, and safe beside other figures of the process."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def _grid_of_axes(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """At most four panels of (width, height) inches in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _legend_above(axes: Axes) -> None:
    """Between title and axes: below them it would collide with slanted names."""
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.99), borderaxespad=0.2)


def _whole_numbers(axes: Axes, axis: str) -> None:
    (axes.xaxis if axis == "x" else axes.yaxis).set_major_locator(MaxNLocator(6, integer=True))


def short(name: str, width: int = 30) -> str:
    """A name that fits; control characters shown as escapes, other scripts as they are."""
    lines: Sequence[str] = [visible(line) for line in name.split("\n")]
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)

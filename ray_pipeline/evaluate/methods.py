"""The page of a comparison of training methods: one table, as Markdown, CSV and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ray_pipeline.evaluate.comparison import Comparison
from ray_pipeline.evaluate.headline import percent
from ray_pipeline.evaluate.method_stats import MethodStats, OverSeeds, PolicyStats
from ray_pipeline.evaluate.methods_page import methods_page
from ray_pipeline.evaluate.metrics import as_json
from ray_pipeline.evaluate.plots import row_of_axes, save_figures, short
from ray_pipeline.evaluate.summary import as_csv
from ray_pipeline.report.markdown import Safe, inline, render

#: Okabe & Ito (2008) without black, in the order in which data sets are drawn.
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")


def build_comparison(page: Comparison, out_dir: Path) -> list[Path]:
    """Write report.md, report.html, methods.csv (a row a method and data set), policies.csv (a row a policy),
    metrics.json and plots/methods.png; return their paths. Equal results give equal bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    plots = save_figures({"methods": lambda: _figure(page)}, out_dir / "plots")
    texts = {
        "methods.csv": as_csv(*(_method_row(method) for method in page.methods)),
        "policies.csv": as_csv(*(_policy_row(policy) for policy in page.policies)),
        "metrics.json": _metrics_json(page),
        "report.html": methods_page(page),
        "report.md": render("methods.md.j2", _values(page, plots)),
    }
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8", newline="\n")
    return [*(out_dir / name for name in texts), *plots.values()]


def _metrics_json(page: Comparison) -> str:
    numbers = {name: value for name, value in dataclasses.asdict(page).items() if name != "config"}
    return json.dumps(as_json(numbers), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _values(page: Comparison, plots: Mapping[str, Path]) -> dict[str, Any]:
    base = next(policy for policy in page.policies if policy.run is None)
    judges = list(page.methods[0].scores) if page.methods else list(base.scores)
    modes = list(base.accuracy)
    trained = ["data", "rows", "steps", "wins", "95 %", "ties", "flips", "at equal length"]  # what the base has not
    head = ["method", *trained, *judges, "mean score"]
    first = [
        "base",
        *("–" for _ in trained),
        *(_number(base.scores.get(judge)) for judge in judges),
        _number(base.mean_score),
    ]
    rows: list[list[str]] = [[*first, *(Safe(percent(base.accuracy[mode])) for mode in modes)]]
    for method in page.methods:
        rows.append(
            [
                method.method,
                method.data,
                Safe(f"{method.rows:,}"),
                Safe(str(method.steps)),
                _share(method.win_rate),
                Safe(f"{percent(method.win_interval.low)} to {percent(method.win_interval.high)}"),
                _share(method.tie_rate),
                _share(method.flip_rate),
                _share(method.equal_length),
                *(_points(method.scores.get(judge)) for judge in judges),
                _points(method.mean_score),
                *(_share(method.accuracy.get(mode)) for mode in modes),
            ]
        )
    gains = [
        [
            d.method,
            f"{d.data} − {d.over}",
            d.measure,
            _points(d.gain, 2) if d.measure == "mean score" else _signed(d.gain),
        ]
        for d in page.differences
    ]
    return {
        "page": page,
        "columns": len(head) + len(modes),
        "head": _line(head + [f"right, {mode}" for mode in modes]),
        "rows": [_line(row) for row in rows],
        "gains": [_line(row) for row in gains],
        "truth": [_line([name, *_truth(found)]) for name, found in page.truth.items()],
        "plots": {name: Safe(f"plots/{path.name}") for name, path in plots.items()},
    }


def _line(cells: Sequence[str]) -> Safe:
    """A row of a Markdown table."""
    return Safe(f"| {' | '.join(cell if isinstance(cell, Safe) else inline(cell) for cell in cells)} |")


def _truth(found: Any) -> list[Safe]:
    def share(value: float | None) -> Safe:
        return Safe("–" if value is None else percent(value))

    labelled = [share(value) for value in (found.repeated, found.desirable_right, found.undesirable_wrong)]
    pairs = [share(value) for value in (found.chosen_right, found.rejected_wrong)]
    return [Safe(f"{found.labelled:,}"), *labelled, Safe(f"{found.pairs:,}"), *pairs]


def _number(value: float | None) -> Safe:
    return Safe("–" if value is None else f"{value:.2f}")


def _points(value: OverSeeds | None, digits: int = 2) -> Safe:
    if value is None:
        return Safe("–")
    return Safe(f"{value.mean:.{digits}f}" + ("" if value.error is None else f" ± {value.error:.{digits}f}"))


def _share(value: OverSeeds | None) -> Safe:
    if value is None:
        return Safe("–")
    return Safe(f"{100 * value.mean:.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}") + " %")


def _signed(value: OverSeeds) -> Safe:
    return Safe(f"{100 * value.mean:+.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}") + " points")


def _method_row(method: MethodStats) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method.method, "data": method.data, "rows": method.rows, "steps": method.steps}
    seeded: dict[str, OverSeeds | None] = {
        "win_rate": method.win_rate,
        "tie_rate": method.tie_rate,
        "flip_rate": method.flip_rate,
        "equal_length": method.equal_length,
        **{f"score_{judge}": score for judge, score in method.scores.items()},
        "mean_score": method.mean_score,
        **{f"accuracy_{mode}": share for mode, share in method.accuracy.items()},
        "completion_tokens": method.tokens,
        "train_seconds": method.train_seconds,
    }
    row["seeds"] = method.train_seconds.seeds
    for name, value in seeded.items():
        row[name] = None if value is None else value.mean
        row[f"{name}_error"] = None if value is None else value.error
    return row | {"win_low": method.win_interval.low, "win_high": method.win_interval.high, "unread": method.unread}


def _policy_row(policy: PolicyStats) -> dict[str, Any]:
    run = policy.run
    row: dict[str, Any] = {"policy": "base" if run is None else run.label}
    for name in ("method", "data", "seed", "rows", "steps", "train_seconds"):
        row[name] = None if run is None else getattr(run, name)
    for name in ("win_rate", "tie_rate", "loss_rate", "flip_rate", "unread", "equal_length"):
        row[name] = getattr(policy, name)
    row |= {f"score_{judge}": score for judge, score in policy.scores.items()} | {"mean_score": policy.mean_score}
    return row | {f"accuracy_{mode}": share for mode, share in policy.accuracy.items()} | {"tokens": policy.tokens}


def _figure(page: Comparison) -> Figure | None:
    """A panel a measure: methods side by side, a bar a data set, standard errors over seeds; the line is the base."""
    if not page.methods:
        return None
    base = next(policy for policy in page.policies if policy.run is None)
    panels: list[tuple[str, float, float | None, Any]] = [
        ("wins against base", 1.0, None, lambda m: m.win_rate),
        ("mean score", 10.0, base.mean_score, lambda m: m.mean_score),
    ]
    for mode, share in base.accuracy.items():
        panels.append((f"right answers, {mode}", 1.0, share, lambda m, mode=mode: m.accuracy.get(mode)))
    names = list(dict.fromkeys(method.method for method in page.methods))
    sets = list(dict.fromkeys(method.data for method in page.methods))
    figure, axes_of = row_of_axes(
        len(panels), width=max(4.5, 1.1 + 0.32 * len(names) * len(sets)) * len(panels), height=3.2
    )
    width = 0.8 / len(sets)
    for axes, (title, top, line, value_of) in zip(axes_of, panels, strict=True):
        for i, data in enumerate(sets):
            for method in page.methods:
                value = value_of(method)
                if method.data != data or value is None:
                    continue
                place = names.index(method.method) + (i - (len(sets) - 1) / 2) * width
                label = short(data, 18) if short(data, 18) not in axes.get_legend_handles_labels()[1] else None
                axes.bar(place, value.mean, width * 0.94, color=_COLOURS[i % len(_COLOURS)], label=label)
                axes.errorbar(
                    [place], [value.mean], yerr=[[value.error or 0.0]] * 2, fmt="none", color="black", capsize=2
                )
        if line is not None:
            axes.axhline(line, color="black", linestyle=":", linewidth=1, label="base")
        axes.set_xticks(range(len(names)), [short(name, 16) for name in names])
        axes.set_ylim(0, top)
        axes.set_title(title)
        axes.grid(visible=False, axis="x")
    handles, labels = axes_of[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside lower center")
    return figure

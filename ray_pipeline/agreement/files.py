"""agreement.json and winrate.json as files, with a Markdown page and a heat map of kappas beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_pipeline.agreement.page import CHOSEN_PAIRS, agreement_page, estimate_text, interval_text, winrate_page
from ray_pipeline.agreement.recorded_winrate import VersusRate
from ray_pipeline.evaluate.metrics import as_json
from ray_pipeline.report.markdown import render, visible

#: Juries that the page shows of each strategy; agreement.json has all.
SHOWN_JURIES = 15


def write_agreement(document: Mapping[str, Any], folder: Path) -> Path:
    """agreement.json, report.md, report.html and, where there are kappas, kappa.png; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "agreement.json", document)
    rows, columns, values = _grid(document)
    drawn = draw_heat_map(rows, columns, values, folder / "kappa.png") if rows else None
    juries = _best_juries(document["juries"])
    page = render(
        "agreement.md.j2",
        {
            "document": document,
            "grid": [(row, list(cells)) for row, cells in zip(rows, values, strict=True)],
            "columns": columns,
            "plot": drawn.name if drawn else None,
            "juries": juries,
            "roles": list(dict.fromkeys(role for debate in document["debates"] for role in debate["voices"])),
            "chosen_pairs": CHOSEN_PAIRS,
            "interval": interval_text,
            "estimate": estimate_text,
        },
    )
    _write(folder / "report.html", agreement_page(as_json(document), juries))
    return _write(folder / "report.md", page)


def write_winrate(rates: Sequence[VersusRate], about: Mapping[str, Any], folder: Path) -> Path:
    """winrate.json, report.md and report.html; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(rate) for rate in rates]
    _write_json(folder / "winrate.json", {**about, "runs": rows})
    table = _configurations(rates)
    page = render(
        "winrate.md.j2",
        {
            "about": about,
            "rates": rows,
            "protocols": {row["fingerprint"]: row for row in rows},
            "table": table,
            "interval": interval_text,
            "estimate": estimate_text,
        },
    )
    _write(folder / "report.html", winrate_page(about, as_json(rows), table))
    return _write(folder / "report.md", page)


def _configurations(rates: Sequence[VersusRate]) -> dict[str, Any]:
    """Win rates as a table of configurations by baselines."""
    baselines = sorted({r.baseline for r in rates if r.baseline})
    found = {(r.configuration, r.baseline): dataclasses.asdict(r.win_rate) for r in rates}
    names = list(dict.fromkeys(r.configuration for r in rates if r.baseline))
    return {"baselines": baselines, "rows": [(name, [found.get((name, b)) for b in baselines]) for name in names]}


def _best_juries(juries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for jury in sorted(juries, key=lambda j: (j["kappa"] is None, -(j["kappa"] or 0.0))):
        of_strategy = found.setdefault(jury["strategy"], [])
        if len(of_strategy) < SHOWN_JURIES and jury["kappa"] is not None:
            of_strategy.append(jury)
    return {strategy: shown for strategy, shown in found.items() if shown}


def _grid(document: Mapping[str, Any]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Kappas of judges (rows) by strategy (columns); without labels, those of judges with judges."""
    judged = [*document["judges"], *({**d, "judge": d["debater"]} for d in document["debates"])]
    if document["labelled"]:
        names = list(dict.fromkeys(j["judge"] for j in judged))
        strategies = list(dict.fromkeys(j["strategy"] for j in judged))
        found = {(j["judge"], j["strategy"]): j["kappa"] for j in judged}
        return names, strategies, [[found.get((name, s)) for s in strategies] for name in names]
    rows: list[str] = []
    columns: list[str] = []
    values: list[list[float | None]] = []
    for among in document["among_judges"]:
        columns = columns or list(among["judges"])
        if list(among["judges"]) == columns:
            rows += [f"{judge} ({among['strategy']})" for judge in among["judges"]]
            values += among["kappas"]
    return rows, columns, values


def draw_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], path: Path
) -> Path:
    """Kappas as coloured cells with their numbers written in them, from −1 to 1."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"font.family": "DejaVu Sans", "font.size": 9, "figure.dpi": 120, "text.parse_math": False}
        )
        figure = Figure(figsize=(2.2 + 0.95 * len(columns), 1.3 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(np.ma.masked_invalid(cells), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [_short(c) for c in columns], rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [_short(r) for r in rows])
        for (y, x), value in np.ndenumerate(cells):
            shown = "–" if np.isnan(value) else f"{value:.2f}"
            axes.text(x, y, shown, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
        figure.colorbar(image, ax=axes, label="Cohen's kappa")
        figure.savefig(path, metadata={"Software": None})
        figure.clear()
    return path


def _short(name: str, limit: int = 36) -> str:
    shown = " ".join(visible(name).split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path

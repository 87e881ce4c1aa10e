"""The gate's curve on planted ballots: recomputed by counting, written as data and plot, on the agreement page."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.files import write_agreement
from ray_pipeline.agreement.gate_curves import gate_curves
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.panel import make_panel
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table

LABELS = ["A", "B", "A", "tie", "B", None]
SVG = "{http://www.w3.org/2000/svg}"
#: Scores of three judges on both answers of each item.
SCORES = [
    [(9, 2), (9, 3), (8, 2)],
    [(2, 9), (9, 2), (5, 5)],
    [(3, 8), (3, 9), (2, 9)],
    [(5, 5), (5, 5), (5, 5)],
    [(2, 8), (4, 9), (3, 10)],
    [(9, 1), (9, 1), (9, 1)],
]


def panel(scale: float = 1) -> Any:
    return make_panel(*tables(scale))


def tables(scale: float = 1) -> tuple[Any, Any]:
    """Scores times `scale`; out of 100 where that is 10, else out of 10."""
    strategy = "combined_100" if scale == 10 else "combined_10"
    items, ballots = [], []
    for n, (label, scores) in enumerate(zip(LABELS, SCORES, strict=True)):
        key = {"item_id": f"i{n}", "prompt_id": f"{n:02x}"}
        items.append(
            {**key, "question": "q", "response_a": "a", "response_b": "b", "model_a": None, "model_b": None,
             "human_label": label, "human_votes": []}
        )  # fmt: skip
        for judge, (a, b) in enumerate(scores):
            ballots.append(
                {**key, "strategy": strategy, "judge": f"j{judge}", "voice": "", "order": "ab", "score_a": scale * a,
                 "score_b": scale * b, "vote": "A" if a > b else "B" if b > a else "tie", "reason": None,
                 "parse_status": "ok", "raw": None}
            )  # fmt: skip
    return to_table(items, ITEMS), to_table(ballots, BALLOTS)


def test_the_curve_is_what_counting_gives() -> None:
    (found,) = gate_curves(panel(), draws=100)
    assert found.strategy == "combined_10" and found.judges == ("j0", "j1", "j2")
    for row in found.curve.table.to_pylist():
        kept, right = 0, 0
        for label, scores in zip(LABELS, SCORES, strict=True):
            sides = [[s[k] for s in scores] for k in (0, 1)]
            means = [statistics.mean(s) for s in sides]
            spread = max(statistics.variance(s) for s in sides)
            if label is None or spread > row["tau"] + 1e-6:
                continue
            if row["desirable_at"] is not None and not (
                max(means) >= row["desirable_at"] and min(means) <= row["undesirable_at"]
            ):
                continue
            kept += 1
            right += label == ("A" if means[0] > means[1] else "B" if means[1] > means[0] else "tie")
        assert (row["kept"], row["pairs"]) == (kept, 5)
        assert row["agreement"] == (pytest.approx(right / kept) if kept else None)
    assert found.summary[0]["kept"] == 4 and found.summary[0]["agreement"] == 0.75


def test_data_and_plot_are_written(tmp_path: Path) -> None:
    curves = gate_curves(panel(), draws=100)
    settings = MeasureSettings(draws=100)
    document = as_document(measure(*tables(), settings), settings, {"data": "x.jsonl", "replay": "as told"})
    (curve,) = curves
    gate = {"gate_curves": curve.summary, "gate_points": curve.points}
    write_agreement({**document, **gate}, tmp_path, curves)
    chart = ElementTree.parse(tmp_path / "charts" / "gate-1.svg")
    assert len(list(chart.iter(f"{SVG}polyline"))) == sum(bool(line["tau"]) for line in curve.points) > 0
    # A large dot at the gate's τ on every line that has it.
    dots = [circle for circle in chart.iter(f"{SVG}circle") if circle.get("r") == "5"]
    assert len(dots) == sum(curve.tau in line["tau"] for line in curve.points) > 0
    with open(tmp_path / "risk_coverage.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == curves[0].curve.table.num_rows and rows[0]["strategy"] == "combined_10"
    written = write_agreement({**document, "gate_curves": [], "gate_points": []}, tmp_path / "none")
    assert not {"risk_coverage.csv", "gate-1.svg"} & {path.name for path in written}


def test_thresholds_are_shares_of_the_scale_that_the_strategy_names() -> None:
    (found,) = gate_curves(panel(), draws=100)
    assert list(found.curve.areas)[1:] == [(7.0, 4.0), (8.0, 3.0), (6.0, 5.0)]
    (own,) = gate_curves(panel(), [(0.9, 0.2)], draws=100)
    assert list(own.curve.areas) == [None, (9.0, 2.0)]
    for pair, told in (((0.2, 0.9), r"0\.2, 0\.9"), ((0.5, 0.5), r"0\.5, 0\.5")):
        with pytest.raises(ValidationError, match=f"{told} must be shares"):
            MeasureSettings(gate_thresholds=(pair,))


def test_the_scale_is_the_strategys_whatever_the_judges_gave() -> None:
    """The same judgements out of 100 give the same curve, with thresholds and τ of that scale."""
    (tens,), (hundreds,) = gate_curves(panel(), draws=100), gate_curves(panel(scale=10), draws=100)
    assert list(hundreds.curve.areas)[1:] == [(70.0, 40.0), (80.0, 30.0), (60.0, 50.0)]
    assert (tens.tau, hundreds.tau) == (2.5, 250.0)
    for one, other in zip(tens.summary, hundreds.summary, strict=True):
        assert one["kept"] == other["kept"] and one["agreement"] == other["agreement"]
        assert one["area"] == pytest.approx(other["area"])
    # A panel that never goes over 5 is still judged on the scale that it was given.
    (low,) = gate_curves(panel(scale=0.5), draws=100)
    assert list(low.curve.areas)[1:] == [(7.0, 4.0), (8.0, 3.0), (6.0, 5.0)]


def test_the_interval_is_of_the_confidence_that_is_asked_for() -> None:
    (narrow,), (wide,) = (gate_curves(panel(), draws=400, confidence=c) for c in (0.5, 0.99))
    inner, outer = narrow.summary[0], wide.summary[0]
    assert outer["agreement_low"] <= inner["agreement_low"] <= inner["agreement_high"] <= outer["agreement_high"]
    assert outer["agreement_high"] - outer["agreement_low"] > inner["agreement_high"] - inner["agreement_low"]


def test_points_are_those_of_the_table() -> None:
    (found,) = gate_curves(panel(), draws=100)
    rows = [row for row in found.curve.table.to_pylist() if row["kept"]]
    assert sum(len(line["tau"]) for line in found.points) == len(rows)
    plain = found.points[0]
    assert plain["desirable_at"] is None
    assert plain["coverage"] == [row["coverage"] for row in rows if row["desirable_at"] is None]
    assert plain["coverage"] == sorted(plain["coverage"])

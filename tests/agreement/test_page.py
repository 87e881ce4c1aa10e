"""agreement.json, winrate.json and their pages: complete, escaped, the same every time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.files import write_agreement, write_winrate
from ray_pipeline.agreement.gate_curves import gate_curves
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.panel import make_panel
from ray_pipeline.agreement.recorded_winrate import versus_rates
from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table

NASTY = "j|udge <b>*1*"


def tables(labelled: bool = True) -> tuple[Any, Any]:
    truth = ["A", "B", "tie", "A", "B", "A"]
    items = [
        {
            "item_id": f"i{n}", "prompt_id": f"{n:02x}", "question": "q", "response_a": "a" * (n + 1),
            "response_b": "bbb", "model_a": "gpt-3", "model_b": "vicuna", "human_label": label if labelled else None,
            "human_votes": [{"annotator": a, "label": v} for a, v in (("x", label), ("y", "A"))] if labelled else [],
        }
        for n, label in enumerate(truth)
    ]  # fmt: skip
    ballots = []
    for judge in (NASTY, "GPT-4"):
        for n, label in enumerate(truth):
            vote = None if n == 5 and judge == NASTY else label if n % 2 else "A"
            vote = "tie" if n == 3 and judge != NASTY else vote
            base = {"item_id": f"i{n}", "prompt_id": f"{n:02x}", "judge": judge, "reason": None, "raw": None}
            scores = {"A": (8, 3), "B": (3, 8), "tie": (5, 5), None: (None, None)}[vote]
            values = {"score_a": scores[0], "score_b": scores[1], "vote": vote}
            status = "ok" if vote else "unparsed"
            ballots.append(
                {**base, **values, "strategy": "combined_10", "voice": "", "order": "ab", "parse_status": status}
            )
            for voice in ("critic", "public"):
                ballots.append(
                    {**base, **values, "strategy": "debate", "voice": voice, "order": "ab", "parse_status": status}
                )
            ballots.append({**base, **values, "strategy": "versus", "voice": "", "order": "ab", "parse_status": status})
    return to_table(items, ITEMS), to_table(ballots, BALLOTS)


def page(folder: Path, labelled: bool = True) -> tuple[str, dict[str, Any]]:
    settings = MeasureSettings(draws=100)
    items, ballots = tables(labelled)
    document = as_document(measure(items, ballots, settings), settings, {"data": "x.jsonl", "replay": "as told"})
    write_agreement(document, folder)
    return (folder / "report.md").read_text(), json.loads((folder / "agreement.json").read_text())


def test_a_page_with_labels(tmp_path: Path) -> None:
    text, document = page(tmp_path / "one")
    for heading in (
        "Kappas",
        "Judges",
        "The whole panel and its best judge",
        "Debates",
        "Juries, combined_10",
        "Held-out",
        "Bias",
        "Pairs of",
        "Humans among",
    ):
        assert f"\n## {heading}" in text
    assert "None" not in text and "nan" not in text and "<b>" not in text and "j\\|udge" in text
    chart = (tmp_path / "one" / "charts" / "kappas-1.svg").read_text()
    assert "![Kappa with the human labels](charts/kappas-1.svg)" in text
    assert f">{document['judges'][0]['kappa']:.3f}</text>" in chart and "<b>" not in chart
    against = (tmp_path / "one" / "charts" / "debates-1.svg").read_text()
    assert "![A judge against a debate: kappa with the human labels](charts/debates-1.svg)" in text
    assert "judge, combined_10" in against and ">debate</text>" in against
    for found in (*document["judges"], *document["debates"]):
        assert f"{found['kappa']:.3f}" in against
    judge = next(j for j in document["judges"] if j["judge"] == NASTY)
    assert judge["missing"] == 1 and judge["kappa_bounds"][0] < judge["kappa"] < judge["kappa_bounds"][1] + 1e-9
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables_by_width: list[int] = []
    for line, after in itertools.pairwise(lines):
        if set(after) <= set("|-: "):
            tables_by_width.append(line.replace("\\|", "").count("|"))
            assert after.count("|") == tables_by_width[-1], line
    assert len(tables_by_width) == 11
    again, same = page(tmp_path / "two")
    assert again == text and same == document
    assert chart == (tmp_path / "two" / "charts" / "kappas-1.svg").read_text()


def test_the_gates_curve_is_on_both_pages(tmp_path: Path) -> None:
    settings = MeasureSettings(draws=100, confidence=0.8)
    items, ballots = tables()
    (curve,) = gate_curves(make_panel(items, ballots), settings.gate_thresholds, draws=100, confidence=0.8)
    gate = {"gate_curves": curve.summary, "gate_points": curve.points}
    document = as_document(measure(items, ballots, settings), settings, {"data": "x.jsonl", "replay": "as told"})
    write_agreement({**document, **gate}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    title = "Agreement with humans over the share kept, combined_10"
    assert title in html and html.count("<polyline") >= 1 and "≥ 7 and ≤ 4" in html and "80 %" in html
    assert "80 % interval" in text and "| combined_10 | 2 | 2.50 |" in text
    assert (
        json.loads((tmp_path / "agreement.json").read_text())["gate_points"][0]["coverage"]
        == (curve.points[0]["coverage"])
    )


def test_a_page_without_labels_shows_judges_against_judges(tmp_path: Path) -> None:
    text, document = page(tmp_path, labelled=False)
    assert "There are no labels" in text and "(combined_10)" in text and "## Held-out" not in text
    assert all(j["kappa"] is None for j in document["judges"]) and document["among_judges"][0]["kappas"][0][1] < 1
    assert document["judges"][0]["vote_counts"]["A"] > 0
    assert not (tmp_path / "charts" / "debates-1.svg").exists()


def test_a_win_rate_page(tmp_path: Path) -> None:
    items, ballots = tables()
    rates = versus_rates(items, ballots, draws=100)
    first = first_screen("win rates on x", amounts=[(6, "items")], usage=Usage(calls_engine=12.0, prompt_tokens=30.0))
    write_winrate(rates, {"data": "x", "replay": "as told", "draws": 100}, tmp_path, first)
    text = (tmp_path / "report.md").read_text()
    runs = json.loads((tmp_path / "winrate.json").read_text())["runs"]
    assert "12 LLM calls made, 30 tokens" in text and "Highest win rate: GPT-4, 66.7" in text
    assert "| GPT-4 | 6 | 4 | 1 | 1 | 0 |" in text and [r["run"] for r in runs] == ["GPT-4", NASTY]
    assert runs[0]["win_rate"]["value"] == pytest.approx(100 * 4 / 6)

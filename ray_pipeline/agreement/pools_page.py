"""The pools of a whole panel beside its best judge, and the cascade of its judges, on an agreement page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.agreement.pools import BEST, CERTAINTY, LEVEL
from ray_pipeline.report.charts import Series, lines
from ray_pipeline.report.figures import NONE, estimate_text, number, percent, span
from ray_pipeline.report.page import Block, Rows, Section, Table, Text, panels
from ray_pipeline.stats.calibration import ISOTONIC_LEAST


def pools_section(document: Mapping[str, Any]) -> Section | None:
    rows: Rows = [
        [
            p["strategy"],
            p["pool"],
            number(p["items"]),
            estimate_text(p["kappa"], 3),
            estimate_text(p["over_best"], 3),
            *_covered(p["covered"]),
            _covered(p["certified"])[0],
            *(estimate_text(p["calibration"][name], 3) if p["calibration"] else NONE for name in ("ece", "brier")),
        ]
        for p in document["pools"]
    ]
    if not rows:
        return None
    rules = document["settings"]["calibration"]
    text = (
        "One verdict for each item from all judges of a strategy. Majority: the most frequent vote, or a tie where "
        "several lead; its probabilities are the shares of votes. Mean: the answer of the higher mean score. One-coin "
        "and Dawid–Skene: the most probable class of a latent class model of the votes alone, with one accuracy or a "
        "whole table of errors for each judge; their probabilities are too high where judges share their errors. "
        "Calibrated: a regularised logistic model of the one-coin posterior, alone or with votes, scores, length and "
        f"own families; from {ISOTONIC_LEAST} labels on also isotonic regression of the posterior, whichever predicts "
        f"held-out labels best; with fewer than {rules['least']} labels to fit to, that posterior as it is. The chosen "
        "one has the highest kappa on the "
        f"other folds. What labels decide is decided for each of {rules['folds']} folds of the questions from the "
        f"labels of the others. Covered: from the lowest confidence at which {percent(LEVEL, 0)} of the verdicts on "
        "the other folds agree with humans; the confidence of a mean or a single judge is the gap of the scores. "
        f"Certified: from a confidence that the labels of the other folds certify to hold {percent(LEVEL, 0)} "
        f"(fixed-sequence testing at {percent(CERTAINTY, 0)}). ECE: expected calibration error; chance alone makes it "
        "positive. Intervals leave out the error of fits and choices. Probabilities by item: posteriors.csv."
    )
    columns = ["strategy", "verdict", "items", "kappa", f"over the {BEST}"]
    columns += ["covered", "agreement there", "certified", "ECE", "Brier score"]
    chosen: Rows = [
        [p["strategy"], p["pool"], name, number(times)]
        for p in document["pools"]
        for name, times in p["chosen"].items()
    ]
    blocks: list[Block] = [*_reliability(document), Table(columns, rows, text_columns=2), Text(text)]
    if chosen:
        title = "What the labels of other folds chose"
        blocks.append(Table(["strategy", "verdict", "chosen", "folds"], chosen, 3, title, folded=True))
    return Section("pools", "The whole panel and its best judge", blocks)


def _reliability(document: Mapping[str, Any]) -> list[Block]:
    """Share of right verdicts over their probability, one chart for each strategy."""
    charts = []
    for strategy in dict.fromkeys(p["strategy"] for p in document["pools"]):
        found = {p["pool"]: p["calibration"] for p in document["pools"] if p["strategy"] == strategy}
        drawn = [
            Series(name, colour, [b["probability"] for b in bins], [b["right"] for b in bins])
            for name, colour in (("majority", "grey"), ("one-coin", "orange"), ("calibrated", "blue"))
            if (bins := (found.get(name) or {}).get("bins"))
        ]
        if drawn:
            diagonal = Series("calibrated exactly", "ink", [1 / 3, 1.0], [1 / 3, 1.0], dashed=True)
            charts.append(
                lines(f"Right verdicts over their probability, {strategy}", [*drawn, diagonal], "probability")
            )
    return panels(*charts)


def cascades_section(document: Mapping[str, Any]) -> Section | None:
    """Kappa against the share of expensive calls."""
    cascades = document["cascades"]
    if not cascades:
        return None
    charts = []
    rows: Rows = []
    for c in cascades:
        known = [step for step in c["steps"] if step["kappa"]["value"] is not None]
        marks = [(c["open"]["asked"], c["open"]["kappa"]["value"])] if c["open"]["kappa"]["value"] is not None else []
        line = Series("cascade", "blue", [s["asked"] for s in known], [s["kappa"]["value"] for s in known], marks=marks)
        note = f"{c['expensive']} after {', '.join(c['cheap'])}; the dot is where they are not unanimous or tie"
        charts.append(
            lines(f"Kappa over the share of expensive calls, {c['strategy']}", [line], "share asked", note=note)
        )
        rows.append(
            [
                c["strategy"],
                c["expensive"],
                number(len(c["cheap"])),
                number(c["items"]),
                estimate_text(c["steps"][0]["kappa"], 3),
                percent(c["open"]["asked"]),
                estimate_text(c["open"]["kappa"], 3),
                estimate_text(c["steps"][-1]["kappa"], 3),
            ]
        )
    chosen = document["settings"]["cascade"]["expensive"] is None
    text = (
        "Cheap judges vote on every item; the expensive judge decides those on which they are least sure. A tie is the "
        "least sure, then the smallest share of judges who agree with the majority."
        + (" The expensive judge has the highest kappa on one part of the items, which is left out." if chosen else "")
    )
    columns = ["strategy", "expensive judge", "cheap judges", "items", "kappa, cheap alone", "asked where open"]
    columns += ["kappa then", "kappa, expensive alone"]
    return Section("cascade", "The cost of agreement", [*panels(*charts), Table(columns, rows, 2), Text(text)])


def _covered(found: Mapping[str, Any] | None) -> tuple[str, str]:
    return (NONE, NONE) if found is None else (_share(found["coverage"]), _share(found["agreement"]))


def _share(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["value"] is None:
        return percent(found["value"])
    return f"{percent(found['value'])} ({span(100 * found['low'], 100 * found['high'], 1)})"

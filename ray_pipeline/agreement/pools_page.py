"""The pools of a whole panel beside its best judge, on an agreement page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.agreement.pools import LEVEL
from ray_pipeline.report.figures import NONE, estimate_text, number, percent, span
from ray_pipeline.report.page import Rows, Section, Table, Text


def pools_section(document: Mapping[str, Any]) -> Section | None:
    rows: Rows = [
        [
            p["strategy"],
            p["pool"] + (f" ({p['judge']})" if p["judge"] else ""),
            number(p["items"]),
            estimate_text(p["held_out"], 3),
            estimate_text(p["kappa"], 3),
            *(_covered(p["covered"]) if p["covered"] else (NONE, NONE, NONE)),
        ]
        for p in document["pools"]
    ]
    if not rows:
        return None
    text = (
        "All judges of a strategy, pooled without human labels, and the best of them. Majority: the most frequent "
        "vote, or a tie where several lead; its confidence is the share of that vote. Dawid–Skene: the most probable "
        "class of a latent class model of the votes alone; its confidence is that probability, which is too high where "
        "judges share their errors. The best judge has the highest kappa on one part of the items; all items include "
        "that part. Confident from: the lowest confidence from which votes agree with humans on "
        f"{percent(LEVEL, 0)} of that part; then the share of the other items that reach it, and the agreement there. "
        "Intervals leave out the error of both choices. Probabilities by item: posteriors.csv."
    )
    columns = ["strategy", "verdict", "held-out items", "kappa on them", "kappa, all items"]
    columns += ["confident from", "share of held-out items", "agreement there"]
    return Section("pools", "The whole panel and its best judge", [Table(columns, rows, text_columns=2), Text(text)])


def _covered(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return number(found["threshold"], 3), _share(found["coverage"]), _share(found["agreement"])


def _share(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["value"] is None:
        return percent(found["value"])
    return f"{percent(found['value'])} ({span(100 * found['low'], 100 * found['high'], 1)})"

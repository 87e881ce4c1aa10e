"""The debates of an agreement page, and each model as a judge beside a debate of the same model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ray_pipeline.report.charts import Chart, Dot, dots
from ray_pipeline.report.figures import number, span
from ray_pipeline.report.page import Rows, Section, Table, Text, panels
from ray_pipeline.stats.bootstrap import Interval

#: Rows of a chart; the table has all.
PLOTTED = 24
VOTES = ("A", "tie", "B")


def debates_section(document: Mapping[str, Any]) -> Section | None:
    debates = document["debates"]
    if not debates:
        return None
    roles = list(dict.fromkeys(role for debate in debates for role in debate["voices"]))
    rows: Rows = [
        [
            d["debater"],
            *(number(d["vote_counts"][vote]) for vote in VOTES),
            number(d["missing"]),
            f"{number(d['kappa'], 3)} ({span(*d['kappa_interval'])})",
            f"{number(d['other_rule_kappa'], 3)} ({span(*d['other_rule_kappa_interval'])})",
            *(_voice(d["voices"].get(role)) for role in roles),
        ]
        for d in debates
    ]
    columns = ["debater", *VOTES, "missing", "kappa", "kappa by the other rule", *(f"{role} alone" for role in roles)]
    text = Text(f"Voices are pooled by the {debates[0]['rule']} rule.")
    return Section("debates", "Debates", [*panels(_against_debate(document)), text, Table(columns, rows)])


def _against_debate(document: Mapping[str, Any]) -> Chart | None:
    """Each model as a single judge, by strategy, beside a debate among roles of the same model."""
    strategies = dict.fromkeys(j["strategy"] for j in document["judges"])
    colours = dict(zip(strategies, itertools.cycle(("blue", "green", "purple", "orange")), strict=False))
    plotted = []
    for d in document["debates"][:PLOTTED]:
        alone = [
            Dot(f"judge, {j['strategy']}", colours[j["strategy"]], Interval(j["kappa"], *j["kappa_interval"]))
            for j in document["judges"]
            if j["judge"] == d["debater"]
        ]
        debated = Dot("debate", "vermilion", Interval(d["kappa"], *d["kappa_interval"]))
        plotted.append((d["debater"], [*alone, debated]))
    ends = [end for _, found in plotted for dot in found for end in (dot.estimate.low, dot.estimate.mean) if end]
    if not ends or not any(len(found) > 1 for _, found in plotted):
        return None
    title = "A judge against a debate: kappa with the human labels"
    return dots(title, plotted, (min([0.0, *ends]), 1.0), shares=False)


def _voice(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{number(found['kappa'], 3)} ({span(*found['kappa_interval'])})"

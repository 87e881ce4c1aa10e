"""The page of judge_card.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.judge_card.measure import READ
from ray_pipeline.judge_card.probes import ORDER, PLAIN
from ray_pipeline.judge_card.section import points
from ray_pipeline.report.charts import Dot, dots
from ray_pipeline.report.figures import number, percent, percent_interval, signed
from ray_pipeline.report.page import Block, Page, Rows, Section, Table, Text, panels
from ray_pipeline.stats.bootstrap import Interval

_COLOURS = ("blue", "orange", "green", "purple", "vermilion", "grey")
_ABOUT = {PLAIN: "the pairs as they stand", ORDER: "the plain pairs in both orders: no two different winners"}


def card_page(
    document: Mapping[str, Any], probes: Mapping[str, str], *, items: int, verdicts: int, usage: Usage
) -> Page:
    """The page of judge_card.json.

    Args:
        probes: probe → what it does.
        items, verdicts: how many.
        usage: of all judges.
    """
    judges: Sequence[Mapping[str, Any]] = document["judges"]
    sections = [
        _scores("sets", "Public sets", judges, "set", {}),
        _scores("probes", "Probes", judges, "probe", {**_ABOUT, **probes}),
        _subsets(judges),
        _took(judges, document["currency"]),
        _protocols(judges),
    ]
    return Page(
        title="Judge card",
        subtitle=f"Quorum, judge check. {', '.join(sorted({judge['facts']['model'] for judge in judges}))}",
        headline=" ".join(_headline(judge) for judge in judges),
        about=first_screen(
            "judges on public sets and probes with known answers",
            judges={"": {judge["facts"]["judge"]: judge["facts"]["model"] for judge in judges}},
            amounts=[(items, "items"), (verdicts, "verdicts")],
            usage=usage,
        ),
        sections=[section for section in sections if section is not None],
    )


def _headline(judge: Mapping[str, Any]) -> str:
    """The judge's sets, or without any its plain pairs, and the probe that misleads it most."""
    scores = judge["scores"]
    sets = [f"{score['title']} {percent(score['share']['mean'])}" for score in scores if score["kind"] == "set"]
    parts = sets or [f"plain pairs {percent(s['share']['mean'])}" for s in scores if s["name"] == PLAIN]
    effects = [score for score in scores if score["effect"] is not None and (score["effect"]["mean"] or 0) < 0]
    if effects:
        worst = min(effects, key=lambda score: score["effect"]["mean"])
        parts.append(f"most misled by {worst['name']} ({signed(100 * worst['effect']['mean'], 1)} points)")
    return f"{judge['facts']['judge']}: {', '.join(parts)}."


def _scores(
    section: str, title: str, judges: Sequence[Mapping[str, Any]], kind: str, about: Mapping[str, str]
) -> Section | None:
    """Every score of a kind: a chart with a row per score and a dot per judge, and a table."""
    found = [(judge, score) for judge in judges for score in judge["scores"] if score["kind"] == kind]
    if not found:
        return None
    probes = kind == "probe"
    names = list(dict.fromkeys(score["name"] for _, score in found))
    colours = {judge["facts"]["judge"]: _COLOURS[n % len(_COLOURS)] for n, judge in enumerate(judges)}
    charted = [
        (
            next(score["title"] for _, score in found if score["name"] == name),
            [
                Dot(judge["facts"]["judge"], colours[judge["facts"]["judge"]], Interval(**score["share"]))
                for judge, score in found
                if score["name"] == name
            ],
        )
        for name in names
    ]
    rows: Rows = []
    for judge, score in found:
        share = Interval(**score["share"])
        effect = None if score["effect"] is None else Interval(**score["effect"])
        rows.append(
            [
                judge["facts"]["judge"],
                score["title"],
                about.get(score["name"], score["rule"]),
                number(share.rows),
                percent(share.mean),
                percent_interval(share),
                *([points(effect)] if probes else []),
                percent(score["unread"]),
            ]
        )
    columns = ["judge", kind, "what the probe does" if probes else "rule", "pairs" if probes else "items", "accuracy"]
    columns += ["interval", *(["effect, points"] if probes else []), "unread"]
    blocks: list[Block] = [
        *panels(dots("Accuracy with intervals", charted, (0.0, 1.0))),
        Table(columns, rows, text_columns=3),
    ]
    text = "Intervals are 95 % percentile intervals of a bootstrap of the questions; exact ones where all agree."
    if probes:
        text = (
            "A pair is right if one order names the right answer and the other names it too, ties or is unread. The "
            "effect of a probe is this accuracy minus that on the same pairs without it (or in its control, with the "
            f"names swapped); its interval resamples pairs. {text}"
        )
    return Section(section, title, [*blocks, Text(text)])


def _subsets(judges: Sequence[Mapping[str, Any]]) -> Section | None:
    rows: Rows = [
        [judge["facts"]["judge"], score["title"], subset or "–", percent(share)]
        for judge in judges
        for score in judge["scores"]
        for subset, share in score["subsets"].items()
    ]
    if not rows:
        return None
    return Section("subsets", "Subsets", [Table(["judge", "set", "subset", "accuracy"], rows, text_columns=3)])


def _took(judges: Sequence[Mapping[str, Any]], currency: str) -> Section:
    rows: Rows = []
    for judge in judges:
        read = next((score for score in judge["scores"] if score["name"] == READ), None)
        rows.append(
            [
                judge["facts"]["judge"],
                percent(read["unread"] if read else None),
                number(judge["seconds_per_1000"], 1),
                number(judge["cost_per_1000"], 4),
            ]
        )
    columns = ["judge", "unread replies", "seconds per 1,000 calls", f"{currency} per 1,000 calls"]
    text = (
        "Seconds that the engine was held, without its start (at an endpoint: on the clock), at the concurrency of "
        "this run; judges on one engine share them. Retries are calls, calls from the call log are not counted."
    )
    return Section("took", "Replies, time and cost", [Table(columns, rows), Text(text)])


def _protocols(judges: Sequence[Mapping[str, Any]]) -> Section:
    rows: Rows = [
        [
            judge["facts"]["judge"],
            judge["facts"]["model"],
            "; ".join(f"{name} {value}" for name, value in judge["facts"]["identity"].items()),
            judge["facts"]["protocol"],
        ]
        for judge in judges
    ]
    return Section("judges", "Judges", [Table(["judge", "model", "identity", "protocol"], rows, text_columns=4)])

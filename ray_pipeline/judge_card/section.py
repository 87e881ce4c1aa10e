"""The cards of a run's judges, as a section of its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.report.figures import NONE, percent, percent_interval, signed, span
from ray_pipeline.report.page import Rows, Section, Table, Text
from ray_pipeline.stats.bootstrap import Interval


def cards_section(cards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section | None:
    """The cards of a run's judges.

    Args:
        cards: key of a model → the judges of its card.
    """
    rows: Rows = [row for key, judges in cards.items() for judge in judges for row in _card_rows(key, judge)]
    if not rows:
        return None
    columns = ["model", "judge on its card", "score", "share", "interval", "effect, points"]
    text = "Made by `quorum judge-check` before this run, on sets and probes with known answers (`models.NAME.card`)."
    return Section("judge-cards", "Judge cards", [Table(columns, rows, text_columns=3), Text(text)])


def _card_rows(key: str, judge: Mapping[str, Any]) -> Iterator[list[Any]]:
    for score in judge["scores"]:
        share = Interval(**score["share"])
        effect = None if score["effect"] is None else Interval(**score["effect"])
        title = score["title"]
        yield [key, judge["facts"]["judge"], title, percent(share.mean), percent_interval(share), points(effect)]


def points(effect: Interval | None) -> str:
    """A difference of shares in points, with its interval."""
    if effect is None or effect.mean is None:
        return NONE
    low, high = (None if end is None else 100 * end for end in (effect.low, effect.high))
    return signed(100 * effect.mean, 1) + (f" ({span(low, high, 1)})" if low is not None else "")

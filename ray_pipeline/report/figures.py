"""Figures as text, the same on every page; "–" for an unknown figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.stats.bootstrap import Interval

NONE = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A count with commas, or a float with `digits` decimals."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference with its sign."""
    return NONE if value is None else f"{value:+.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as "12.3 %"."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def span(low: float | None, high: float | None, digits: int = 2) -> str:
    """The bounds of an interval, "0.11 to 0.50"."""
    return NONE if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"


def percent_interval(interval: Interval) -> str:
    """The bounds of an interval of shares, "10.0 to 20.0 %"."""
    if interval.low is None or interval.high is None:
        return "no interval"
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def estimate_text(found: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`0.31 (0.11 to 0.50)`; "–" for nothing."""
    if found is None or found["value"] is None:
        return "–"
    value = f"{round(found['value'], digits) + 0.0:.{digits}f}"  # adding 0 makes a negative zero a plain one
    return value if found["low"] is None else f"{value} ({span(found['low'], found['high'], digits)})"

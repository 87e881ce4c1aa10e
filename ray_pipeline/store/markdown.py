"""The few forms of Markdown in written files: a cell, and a section with a table of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cell(value: Any) -> str:
    """A value on one line of a table."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def key_table(title: str, values: Mapping[str, Any], level: int = 2) -> list[str]:
    """Lines of a section: heading, and a table of keys and values."""
    rows = [f"| {key} | {cell(value)} |" for key, value in values.items()]
    return [f"{'#' * level} {title}", "", "| | |", "|---|---|", *rows, ""]

"""The table of prediction-powered means, the same on every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.report.figures import estimate_text, number
from ray_pipeline.report.page import Rows, Table


def powered_table(rows: Sequence[tuple[str, Mapping[str, Any]]], what: str) -> Table:
    """One row a mean: its name and the `Powered` behind it as plain data.

    Args:
        what: heading of the names.
    """
    cells: Rows = [
        [
            name,
            number(found["labels"]),
            number(found["unlabelled"]),
            estimate_text(found["alone"], 3),
            estimate_text(found["powered"], 3),
            number(found["weight"]),
            number(None if found["worth"] is None else round(found["worth"])),
        ]
        for name, found in rows
    ]
    columns = [what, "labels", "items without", "labels alone", "with predictions", "weight", "worth in labels"]
    return Table(columns, cells)

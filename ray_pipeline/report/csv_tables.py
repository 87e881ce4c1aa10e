"""Tables as CSV, for spreadsheets: no cell is a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ray_pipeline.report.documents import as_json
from ray_pipeline.report.escaping import csv_cell


def as_csv(*rows: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """Header and a line for each row; NaN, None and what a row has not are empty cells.

    Args:
        columns: default: those of the first row.
    """
    columns = list(rows[0]) if columns is None else columns
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(csv_cell(column) for column in columns)
    for row in rows:
        values = [as_json(row.get(column)) for column in columns]
        writer.writerow(["" if v is None else csv_cell(v) if isinstance(v, str) else v for v in values])
    return text.getvalue()


def arrow_csv(table: pa.Table) -> str:
    """An Arrow table of numbers and texts."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            cells = [None if text is None else csv_cell(text) for text in table[field.name].to_pylist()]
            table = table.set_column(place, field, pa.array(cells, field.type))
    out = io.BytesIO()
    pyarrow.csv.write_csv(table, out)
    return out.getvalue().decode()

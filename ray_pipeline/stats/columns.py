"""Arrow columns as numbers and counts: null becomes NaN and is never counted as a value."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spread:
    """Mean ± sample standard deviation (n−1) of `n` numbers; None where there are too few numbers."""

    n: int
    mean: float | None
    sd: float | None


def spread(values: NDArray[np.float64]) -> Spread:
    """Mean and sample standard deviation of the values that are not NaN."""
    known = values[~np.isnan(values)]
    return Spread(
        n=len(known),
        mean=float(known.mean()) if len(known) else None,
        sd=float(known.std(ddof=1)) if len(known) > 1 else None,
    )


def numbers(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float64]:
    """A numeric or boolean column as float64, NaN for null."""
    if pa.types.is_boolean(column.type):  # Arrow has no cast from bool to double
        column = column.cast(pa.int8())
    return np.asarray(chunk(column.cast(pa.float64())).to_numpy(zero_copy_only=False), dtype=np.float64)


def chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column in one piece, as `pc.index_in` and `pc.is_in` need their value set."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, by name; null is counted as "null"."""
    pairs = ((v["values"], v["counts"]) for v in column.value_counts().to_pylist())
    return dict(sorted(("null" if value is None else str(value), count) for value, count in pairs))


def response_chars(table: pa.Table) -> NDArray[np.float64]:
    """Characters of each response: of `response`, or of `response_chars` in a table without the texts."""
    if "response_chars" in table.column_names:
        return numbers(table.column("response_chars"))
    return numbers(pc.utf8_length(table.column("response")))


def refuse_repeats(ids: pa.ChunkedArray | pa.Array, table: str) -> None:
    """Raise ValueError when an id occurs twice: a join by it would be wrong."""
    if len(ids) != pc.count_distinct(ids, mode="all").as_py():
        raise ValueError(f"{table}: duplicate candidate_id; each candidate must have exactly one row")

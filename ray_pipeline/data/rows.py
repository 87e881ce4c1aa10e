"""Rows of Arrow tables by key and by number: the only joins of the stages, so that none is ever by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Rows = NDArray[np.int64]

#: Rows that `gather` puts together at a time: texts of one piece must fit Arrow's 32-bit offsets (2 GB).
_PIECE = 10_000


class KeyMismatch(ValueError):
    """Two tables do not fit together; the message names both and one id."""


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column of ids in one piece, as `pc.index_in` needs its value set."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def refuse_repeats(ids: pa.Array, what: str) -> None:
    """Raises KeyMismatch when an id occurs twice, naming the smallest such id."""
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise KeyMismatch(f"{what} {pc.min(repeated).as_py()!r} occurs more than once; each may have one row only")


def rows_of(ids: pa.ChunkedArray | pa.Array, known: pa.ChunkedArray | pa.Array, what: str, where: str) -> Rows:
    """Row number in `known` of every id.

    Args:
        ids: any number of ids, in any order.
        known: distinct ids.
        what: the table and id that is looked up, for the message ("verdicts: candidate").
        where: the table that is looked in.

    Raises:
        KeyMismatch: an id is not known, or a known id occurs twice.
    """
    known = one_array(known)
    refuse_repeats(known, f"{where}: id")
    found = pc.index_in(one_array(ids), value_set=known)
    if found.null_count:
        lost = pc.min(one_array(ids).filter(pc.is_null(found))).as_py()
        raise KeyMismatch(f"{what} {lost!r} is not in {where} ({found.null_count} such rows)")
    return np.asarray(found, dtype=np.int64)


def gather(table: pa.Table, rows: Rows) -> pa.Table:
    """The rows of these numbers, in this order.

    `Table.take` joins all chunks first and fails on more than 2 GB of text; this joins only small pieces.
    """
    batches = table.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1]
    pieces = [table.schema.empty_table()]
    for begin in range(0, len(rows), _PIECE):
        wanted = rows[begin : begin + _PIECE]
        owner = np.searchsorted(starts, wanted, side="right") - 1
        by_owner = np.argsort(owner, kind="stable")
        parts = []
        for number in np.unique(owner):
            mine = by_owner[owner[by_owner] == number]
            parts.append(batches[number].take(pa.array(wanted[mine] - starts[number])))
        back = np.empty(len(wanted), dtype=np.int64)
        back[by_owner] = np.arange(len(wanted))
        pieces.append(pa.Table.from_batches(parts, schema=table.schema).take(pa.array(back)))
    return pa.concat_tables(pieces)


def add_counts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum of nested counts, name by name: `[{"a": 1, "b": {"c": 2}}, …]`. Names keep their first order."""
    total: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, Mapping):
                total[name] = add_counts([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def flat_counts(counts: Mapping[str, Any], before: str = "", between: str = ".") -> dict[str, Any]:
    """Nested counts as one level, path by path: `{"a.b": 2}` from `{"a": {"b": 2}}`; `before` precedes every path."""
    flat: dict[str, Any] = {}
    for name, value in counts.items():
        path = f"{before}{name}"
        flat |= flat_counts(value, path + between, between) if isinstance(value, Mapping) else {path: value}
    return flat

"""Rows of a whole source, put apart on disk by shard or number. In memory are one part and what is not written yet."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.data.rows import Rows, gather
from ray_pipeline.store.keys import check_num_shards, shard_of
from ray_pipeline.store.schemas import to_table

#: Characters or bytes of rows that are held before they are written out by part.
HELD = 1 << 25
BATCH_ROWS = 1024


class Spill:
    """A context manager: rows of `schema` are added in any order and read part by part.

    Args:
        num_shards: number of parts of rows that are put apart by their `prompt_id`.
    """

    def __init__(self, schema: pa.Schema, num_shards: int = 1) -> None:
        self.rows = 0
        self._schema, self._num_shards = schema, check_num_shards(num_shards)
        self._tables: list[pa.Table] = []
        self._parts: list[Rows] = []
        self._batch: list[Mapping[str, Any]] = []
        self._size = self._flushed = 0
        self._folder = tempfile.TemporaryDirectory(prefix="quorum-rows-")

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row to the shard of its prompt."""
        self._batch.append(row)
        self.rows += 1
        self._size += _characters(row)
        if len(self._batch) >= BATCH_ROWS:
            self._close_batch()
        if self._size > HELD:
            self._flush()

    def add_table(self, table: pa.Table, parts: Rows) -> None:
        """Add the rows of a table, each to the part of this number."""
        self._tables.append(table)
        self._parts.append(parts)
        self.rows += table.num_rows
        self._size += table.nbytes
        if self._size > HELD:
            self._flush()

    def read(self, part: int) -> pa.Table:
        """The rows of a part in the order in which they were added."""
        self._flush()
        parts = [self._schema.empty_table()]
        for path in sorted((Path(self._folder.name) / str(part)).glob("*.arrow")):
            with pa.OSFile(str(path)) as file:
                parts.append(pa.ipc.open_file(file).read_all())
        return pa.concat_tables(parts)

    def _close_batch(self) -> None:
        if self._batch:
            self._tables.append(to_table([dict(row) for row in self._batch], self._schema))
            self._parts.append(np.array([shard_of(row["prompt_id"], self._num_shards) for row in self._batch]))
            self._batch = []

    def _flush(self) -> None:
        self._close_batch()
        if not self._tables:
            return
        parts = np.concatenate(self._parts)
        order = np.argsort(parts, kind="stable")
        table = gather(pa.concat_tables(self._tables), order)
        numbers, starts = np.unique(parts[order], return_index=True)
        for part, start, end in zip(numbers, starts, np.append(starts, len(order))[1:], strict=True):
            place = Path(self._folder.name) / str(part)
            place.mkdir(exist_ok=True)
            with pa.ipc.new_file(str(place / f"{self._flushed:08d}.arrow"), self._schema) as file:
                file.write_table(table.slice(start, end - start))
        self._tables, self._parts, self._size, self._flushed = [], [], 0, self._flushed + 1


def _characters(value: Any) -> int:
    """Characters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0

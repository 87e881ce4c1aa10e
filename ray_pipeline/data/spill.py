"""Rows of a whole source, put apart by shard on disk. In memory are one shard and what is not written yet."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_pipeline.data.rows import shard_rows

#: Characters of text that are held before they are written out by shard.
HELD = 1 << 25
BATCH_ROWS = 1024


class Spill:
    """A context manager: rows of `schema`, which has `prompt_id`, are added in any order and read shard by shard."""

    def __init__(self, schema: pa.Schema, num_shards: int) -> None:
        self.rows = 0
        self._schema, self._num_shards = schema, num_shards
        self._texts = [field.name for field in schema if pa.types.is_string(field.type)]
        self._tables: list[pa.Table] = []
        self._batch: list[Mapping[str, Any]] = []
        self._chars = self._flushed = 0
        self._folder = tempfile.TemporaryDirectory(prefix="quorum-rows-")

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def add(self, row: Mapping[str, Any]) -> None:
        self._batch.append(row)
        self.rows += 1
        self._chars += sum(len(row[name] or "") for name in self._texts)
        if len(self._batch) >= BATCH_ROWS:
            self._tables.append(pa.Table.from_pylist(self._batch, self._schema))
            self._batch = []
        if self._chars > HELD:
            self._flush()

    def read(self, shard: int) -> pa.Table:
        """The rows of a shard in the order in which they were added."""
        self._flush()
        parts = [self._schema.empty_table()]
        for path in sorted((Path(self._folder.name) / str(shard)).glob("*.arrow")):
            with pa.OSFile(str(path)) as file:
                parts.append(pa.ipc.open_file(file).read_all())
        return pa.concat_tables(parts)

    def _flush(self) -> None:
        if not self._tables and not self._batch:
            return
        table = pa.concat_tables([*self._tables, pa.Table.from_pylist(self._batch, self._schema)])
        for shard, part in enumerate(shard_rows(table, self._num_shards)):
            if part.num_rows:
                place = Path(self._folder.name) / str(shard)
                place.mkdir(exist_ok=True)
                with pa.ipc.new_file(str(place / f"{self._flushed:08d}.arrow"), self._schema) as file:
                    file.write_table(part)
        self._tables, self._batch, self._chars, self._flushed = [], [], 0, self._flushed + 1

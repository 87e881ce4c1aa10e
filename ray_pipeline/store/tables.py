"""Sharded tables: one Parquet file per shard, done when the file exists with the fingerprint in its footer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.store.errors import DamagedFile, ForeignFile
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import shard_of
from ray_pipeline.store.schemas import TABLES, to_table


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


@dataclasses.dataclass(frozen=True)
class ShardedTable:
    """A table of a run, cut into shards by prompt_id.

    Attributes:
        folder: location of the folder that holds the shards.
        kind: name of the schema in `schemas.TABLES`.
        num_shards: number of shards; empty ones have a file too.
        fingerprint: of the stage that wrote it.
    """

    folder: str
    kind: str
    num_shards: int
    fingerprint: str

    @property
    def schema(self) -> pa.Schema:
        return TABLES[self.kind]

    def write(self, shard: int, table: pa.Table) -> int:
        """Commit a shard; returns its number of rows.

        Raises:
            ValueError: the table does not have exactly the schema of its kind.
        """
        if not table.schema.equals(self.schema):
            raise ValueError(f"a {self.kind} table must have the schema\n{self.schema}\nnot\n{table.schema}")
        Folder(self.folder).write_table(shard_name(shard), table, fingerprint=self.fingerprint, kind=self.kind)
        return int(table.num_rows)

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Commit all shards: each row in that of its prompt_id, in this order."""
        shards: list[list[Any]] = [[] for _ in range(self.num_shards)]
        for row in rows:
            shards[shard_of(row["prompt_id"], self.num_shards)].append(row)
        for shard, part in enumerate(shards):
            self.write(shard, to_table(part, self.schema))

    def read(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """One shard. Raises FileNotFoundError, DamagedFile or ForeignFile, each naming the file."""
        return Folder(self.folder).read_table(
            shard_name(shard), fingerprint=self.fingerprint, kind=self.kind, schema=self.schema, columns=columns
        )

    def scan(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The shards in order, one in memory at a time."""
        for shard in range(self.num_shards):
            yield self.read(shard, columns)

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """The whole table in memory."""
        return pa.concat_tables(list(self.scan(columns)))

    def has(self, shard: int) -> bool:
        """Whether a shard is there and can be used, from its footer alone."""
        try:
            self._check(shard)
        except (FileNotFoundError, DamagedFile, ForeignFile):
            return False
        return True

    def state(self) -> ShardState:
        """Which shards exist, from names and footers alone."""
        present = set(Folder(self.folder).names(".parquet"))
        rows: dict[int, int] = {}
        bad: dict[int, str] = {}
        for shard in range(self.num_shards):
            if shard_name(shard) not in present:
                continue
            try:
                rows[shard] = self._check(shard)
            except FileNotFoundError:  # deleted since the folder was listed
                continue
            except (DamagedFile, ForeignFile) as error:
                bad[shard] = str(error)
        missing = [s for s in range(self.num_shards) if s not in rows]
        return ShardState(rows=rows, bad=bad, missing=missing)

    def _check(self, shard: int) -> int:
        """Rows of a shard. Raises FileNotFoundError, DamagedFile or ForeignFile."""
        return Folder(self.folder).check_table(
            shard_name(shard), fingerprint=self.fingerprint, kind=self.kind, schema=self.schema
        )


@dataclasses.dataclass(frozen=True)
class JoinedTables:
    """Tables of one kind, from several stages of a run, to be read as one."""

    tables: Sequence[ShardedTable]

    @property
    def kind(self) -> str:
        return self.tables[0].kind

    def read(self, shard: int) -> pa.Table:
        """One shard of all tables. Raises as `ShardedTable.read`."""
        return pa.concat_tables([table.read(shard) for table in self.tables])


@dataclasses.dataclass(frozen=True)
class ShardState:
    """Shard → rows of the finished shards, shard → reason of the unusable ones, and the shards still to be made."""

    rows: dict[int, int]
    bad: dict[int, str]
    missing: list[int]

    @property
    def done(self) -> bool:
        return not self.missing

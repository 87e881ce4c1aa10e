"""The call log's files: every LLM reply, found again by what was asked of whom.

Layout: `<root>/<model>/<shard>of<num_shards>-<writer>-<number>.parquet`. A part holds the calls of the prompts of one
shard, that is of the buckets b with b mod num_shards = shard. Both numbers stand in the file's name, so a reader with
any other shard count knows which parts can hold calls of its own buckets without opening them: shard i of n and
shard j of m share a bucket exactly if i = j modulo min(n, m), because both counts are powers of two.

Replies that cannot be written there when a process ends are set aside on its machine, in the folder of local copies,
and put back by the next one.

Parts are never changed. A writer merges only parts of its own, and puts the merged part in place before it removes
them, so a reader sees each call at least once at any time; equal keys are read once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.local import cache_folder
from ray_pipeline.store.schemas import CALLS, to_table

logger = logging.getLogger("quorum.calls")

_FINGERPRINT = "calls-v1"
#: Rows a row group: small enough that a reader of one bucket range skips most of a large part.
_ROW_GROUP = 2048


def model_folder(root: Folder, identity: Any) -> Folder:
    """The folder of one model's calls. A model is its identity: other weights are another folder."""
    return root / digest(["model", identity], size=8)


def identities(root: Folder) -> list[dict[str, Any]]:
    """Identities of the models with calls in a call log, as far as they can be read."""
    found: list[dict[str, Any]] = []
    for name in root.folders():
        folder = root / name
        for part in folder.names(".parquet")[:1]:
            with contextlib.suppress(StoreError, OSError, ValueError):
                table = folder.read_table(part, fingerprint=_FINGERPRINT, kind="calls", schema=CALLS, columns=["model"])
                found += [json.loads(row) for row in table["model"].slice(0, 1).to_pylist()]
    return [identity for identity in found if isinstance(identity, dict)]


def part_name(shard: int, num_shards: int, writer: str, number: int) -> str:
    return f"{shard:04d}of{num_shards:04d}-{writer}-{number:06d}.parquet"


class Listing:
    """The parts in a model's folder, indexed by the shard that they were written under."""

    def __init__(self, folder: Folder) -> None:
        self._parts: dict[int, dict[int, list[str]]] = {}  # number of shards → shard → names
        for name in folder.names(".parquet"):
            with contextlib.suppress(ValueError):  # a stranger's file
                shard, num_shards = (int(x) for x in name.split("-", 1)[0].split("of"))
                self._parts.setdefault(num_shards, {}).setdefault(shard, []).append(name)

    def of(self, shard: int, num_shards: int) -> list[str]:
        """Names of the parts that can hold calls of the prompts of a shard."""
        found: list[str] = []
        for written, parts in self._parts.items():
            step = min(written, num_shards)
            for i in range(shard % step, written, step) if step else ():
                found += parts.get(i, ())
        return sorted(found)


class CallWriter:
    """Appends the calls of one shard as part files. One writer per shard attempt; not shared between threads."""

    def __init__(self, folder: Folder, shard: int, num_shards: int) -> None:
        self.folder = folder
        self.shard = shard
        self.num_shards = num_shards
        self.writer = uuid.uuid4().hex[:12]
        self._parts: list[str] = []
        self._number = 0

    def flush(self, rows: list[dict[str, Any]]) -> None:
        """Commit rows as one part, sorted by bucket. A row that cannot be stored is left out with a warning."""
        if rows:
            self._write(_table(rows))

    def compact(self) -> None:
        """Merge this writer's own parts into one."""
        if len(self._parts) < 2:
            return
        old = list(self._parts)
        tables = [read_part(self.folder, name) for name in old]
        self._parts = []
        self._write(pa.concat_tables(tables))
        for name in old:
            self.folder.delete(name)

    def _write(self, table: pa.Table) -> None:
        order = pc.sort_indices(table, sort_keys=[("bucket", "ascending"), ("call_key", "ascending")])
        name = part_name(self.shard, self.num_shards, self.writer, self._number)
        self.folder.write_table(
            name, table.take(order), fingerprint=_FINGERPRINT, kind="calls", row_group_size=_ROW_GROUP
        )
        self._number += 1
        self._parts.append(name)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    try:
        return to_table(rows, CALLS)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        if len(rows) == 1:
            logger.warning("call log: cannot store the %s call %s (%s)", rows[0]["role"], rows[0]["call_key"], error)
            return CALLS.empty_table()
        return pa.concat_tables([_table([row]) for row in rows])


def read_part(folder: Folder, name: str) -> pa.Table:
    """All calls of one part. Raises as `Folder.read_table`."""
    return folder.read_table(name, fingerprint=_FINGERPRINT, kind="calls", schema=CALLS)


def read_calls(
    folder: Folder,
    shard: int,
    num_shards: int,
    warn: Callable[[str], None] = logger.warning,
    listing: Listing | None = None,
) -> pa.Table:
    """All calls of a shard's prompts, whatever shard counts they were written under; keys may repeat.

    A part that another writer merged away while we read is looked for again; a part that cannot be read is left out
    (its calls are made again), and a damaged one is set aside.

    Args:
        warn: called with a line for each such part.
        listing: of the folder; default: a new one.
    """
    tables: list[pa.Table] = []
    read: set[str] = set()
    for _ in range(20):
        names = (listing or Listing(folder)).of(shard, num_shards)
        listing, vanished = None, False
        for name in (name for name in names if name not in read):
            try:
                table = read_part(folder, name)
            except FileNotFoundError:
                vanished = True
                continue
            except StoreError as error:
                warn(f"call log: {error}; its calls are made again")
                read.add(name)
                continue
            read.add(name)
            mine = pc.equal(pc.bit_wise_and(table["bucket"], pa.scalar(num_shards - 1, pa.int16())), shard)
            tables.append(table.filter(mine))
        if not vanished:
            break
    return pa.concat_tables(tables) if tables else CALLS.empty_table()


def _aside(folder: Folder) -> Folder:
    return Folder(str(cache_folder() / "unwritten-calls" / digest(folder.location)))


def set_aside(folder: Folder, shard: int, num_shards: int, rows: list[dict[str, Any]]) -> str:
    """Keep calls on this machine that cannot be written to a model's folder; returns where.

    Raises:
        NotWritten: they cannot be written here either.
    """
    aside = _aside(folder)
    CallWriter(aside, shard, num_shards).flush(rows)
    return aside.location


def put_back(folder: Folder) -> None:
    """Move calls that were set aside on this machine to their model's folder.

    Raises:
        NotWritten: it still cannot be written.
    """
    try:
        aside = _aside(folder)
        names = aside.names(".parquet")
    except (OSError, RuntimeError):  # this user has no home, or must not read there: nothing can have been set aside
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            folder.write_bytes(name, aside.read_bytes(name))
            aside.delete(name)

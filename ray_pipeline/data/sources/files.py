"""Input files of any filesystem that pyarrow can open: finding them by pattern, reading them, and their digests."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_pipeline.data.sources.source import InputError
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import normalise_location
from ray_pipeline.store.outside import json_value

BATCH_ROWS = 1024
BLOCK_BYTES = 1 << 23
_WILDCARD = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source. `name` is relative to the folder before the first wildcard, so it moves with the data."""

    folder: Folder
    name: str

    @property
    def uri(self) -> str:
        return self.folder.uri(self.name)

    def open_arrow(self, compression: str | None = "detect") -> pa.NativeFile:
        """A stream; `.gz` and `.zst` are unpacked by their names unless `compression` is None."""
        try:
            return self.folder.fs.open_input_stream(self.folder.path(self.name), compression=compression)
        except OSError as error:
            raise InputError(f"{self.uri} cannot be opened ({error}); check the path and its permissions") from error

    def open_seekable(self) -> pa.NativeFile:
        try:
            return self.folder.fs.open_input_file(self.folder.path(self.name))
        except OSError as error:
            raise InputError(f"{self.uri} cannot be opened ({error}); check the path and its permissions") from error

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        # BufferedReader gives lines; pyarrow's own streams have no readline.
        with self.open_arrow() as stream:
            yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), BLOCK_BYTES))


def find_files(path: str) -> list[File]:
    """Files of a path or pattern, sorted by name. `*` and `?` stay within a folder, `**/` spans folders.

    Raises:
        InputError: there is no such file or folder, or nothing fits the pattern.
    """
    try:
        location = normalise_location(path)
        parent, name = posixpath.split(location)
        if not _WILDCARD.search(location) or (os.path.isabs(location) and os.path.exists(location)):
            return [_one_file(Folder(parent), name, path)]
        parts = location.split("/")
        first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
        folder = Folder("/".join(parts[:first]) or "/")
        fits = re.compile(_pattern("/".join(parts[first:])))
        names = sorted(name for name in names_below(folder) if fits.fullmatch(name))
    except (OSError, pa.ArrowException, StoreError) as error:
        raise InputError(f"{path} cannot be listed ({error}); check the path and your access to it") from error
    if not names:
        raise InputError(f"{path} matches no file; check the pattern (it is relative to {folder.location})")
    return [File(folder, name) for name in names]


def _one_file(folder: Folder, name: str, path: str) -> File:
    kind = folder.fs.get_file_info(folder.path(name)).type
    if kind == pafs.FileType.NotFound:
        raise InputError(f"{path} does not exist (looked for {folder.uri(name)}); check the path")
    if kind == pafs.FileType.Directory:
        raise InputError(f"{path} is a folder; name its files, such as {path.rstrip('/')}/*")
    return File(folder, name)


def names_below(folder: Folder) -> Iterator[str]:
    base = folder.path().rstrip("/") + "/"
    for info in folder.fs.get_file_info(pafs.FileSelector(folder.path(), allow_not_found=True, recursive=True)):
        if info.type == pafs.FileType.File:
            yield info.path[len(base) :]


def _pattern(glob: str) -> str:
    """Regular expression of a glob. (`fnmatch` lets * cross folders; `glob` knows only local files.)"""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", glob)
    return "".join(
        tokens.get(part) or (part.replace("[!", "[^", 1) if re.fullmatch(r"\[.+\]", part) else re.escape(part))
        for part in parts
    )


def jsonl_records(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank. Raises InputError, naming file and line."""
    with file.open() as stream:
        for number, line in enumerate(_lines(file, stream), 1):
            if not line.strip():
                continue
            try:
                # A byte order mark is not JSON; editors on Windows write one.
                row = json_value(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise InputError(f"{file.uri}: line {number} is not JSON ({error}); fix or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(
                    f'{file.uri}: line {number} is not a JSON object; each line must be one, such as {{"prompt": "…"}}'
                )
            yield number, row


def _lines(file: File, stream: BinaryIO) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, pa.ArrowException) as error:  # a compressed file that is cut short
        raise InputError(f"{file.uri} is truncated or corrupt ({error}); regenerate it") from error


@contextlib.contextmanager
def open_parquet(file: File) -> Iterator[pq.ParquetFile]:
    """Raises InputError, naming the file, when it is none."""
    with file.open_seekable() as stream:
        try:
            table = pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{file.uri} is truncated or not a Parquet file ({error}); check the file") from error
        yield table


def parquet_batches(file: File, table: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Raises InputError, naming the file, where its pages are damaged."""
    try:
        yield from table.iter_batches(BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.uri} is truncated or corrupt ({error}); regenerate it") from error


def sha256(file: File) -> str:
    """Hex digest of a file's bytes, compressed as they are."""
    total = hashlib.sha256()
    with file.open_arrow(compression=None) as stream:
        while block := stream.read(BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()

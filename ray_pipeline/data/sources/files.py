"""Input files of any filesystem that pyarrow can open: finding them by pattern, reading them, and their digests."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_pipeline.data.sources.source import InputError
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import normalise_location
from ray_pipeline.store.outside import json_value

BATCH_ROWS = 1024
BLOCK_BYTES = 1 << 23
_NO_OBJECT = 'is not a JSON object; each row must be one, such as {"prompt": "…"}'
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


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One row of a file.

    Attributes:
        where: file and place, as messages name them.
        number: of its line, or of the row where lines are no rows. From 1.
        row: its columns; {} where there is a `fault`.
        fault: why it is none, without the place.
    """

    where: str
    number: int
    row: dict[str, Any]
    fault: str | None = None


def json_records(file: File) -> Iterator[Record]:
    """The rows of a file: one object a line, or one array of objects.

    Lines are streamed; an array is held in memory.

    Raises:
        InputError: the file cannot be read, or is an array that is cut short.
    """
    lines = text_lines(file)
    for place, (number, line) in enumerate(lines):
        if place == 0 and line.lstrip().startswith(b"["):
            yield from _array_records(file, [(number, line), *lines])
        else:
            yield _record(f"{file.uri}: line {number}", number, line)


def _array_records(file: File, lines: list[tuple[int, bytes]]) -> Iterator[Record]:
    """The elements of an array; where only the first line is one, it is a bad line like any other."""
    try:
        rows = json_value(b"".join(line for _, line in lines).decode())
    except ValueError as error:
        records = [_record(f"{file.uri}: line {i}", i, line) for i, line in lines]
        if records[0].fault != _NO_OBJECT:
            raise InputError(f"{file.uri} is an array that is not JSON ({error}); fix or regenerate it") from error
        yield from records
        return
    for number, row in enumerate(rows, 1):
        yield _checked(f"{file.uri}: row {number}", number, row)


def _record(where: str, number: int, line: bytes) -> Record:
    try:
        return _checked(where, number, json_value(line.decode()))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return Record(where, number, {}, f"is not JSON ({error}); fix or remove the line")


def _checked(where: str, number: int, row: Any) -> Record:
    good = isinstance(row, dict)
    return Record(where, number, row if good else {}, None if good else _NO_OBJECT)


def jsonl_records(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each row of `json_records`. Raises InputError, naming file and row, at a bad one."""
    for record in json_records(file):
        if record.fault:
            raise InputError(f"{record.where} {record.fault}")
        yield record.number, record.row


def csv_records(file: File, choose: Callable[[list[str]], list[str]]) -> Iterator[Record]:
    """The rows of a CSV file with a header line, all values as text. The delimiter is a comma, or, where the header has
    none, a semicolon or a tab, as spreadsheets of many countries write them.

    Args:
        choose: columns of the file → those to read.

    Raises:
        InputError: the file cannot be read.
    """
    # Only the chosen columns are converted, all as text: a number further down must not change a column's type.
    bad: dict[int, str] = {}
    delimiter = _delimiter(file)
    quote = f"quote texts that contain {delimiter!r}"

    def skip(row: pacsv.InvalidRow) -> str:
        bad[row.number - 1] = f"has {row.actual_columns} columns, not {row.expected_columns}; {quote}"
        return "skip"

    read = pacsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)  # with threads, bad rows have no number
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip)
    try:
        with file.open_arrow() as stream:
            header = pacsv.open_csv(stream, read, parse).schema.names
        columns = choose(header)
        types = dict.fromkeys(columns, pa.string())
        convert = pacsv.ConvertOptions(column_types=types, include_columns=columns)
        with file.open_arrow() as stream:
            rows = (row for batch in pacsv.open_csv(stream, read, parse, convert) for row in batch.to_pylist())
            for number in itertools.count(1):
                # A batch is parsed as a whole, so the bad rows before a good one are known when it comes.
                row = None if number in bad else next(rows, None)
                where = f"{file.uri}: row {number}"
                if row is None and number not in bad:
                    return
                yield Record(where, number, row or {}, bad.get(number))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:  # the latter where the header is not UTF-8
        if "Empty CSV" in str(error):
            return
        remedy = "save it as UTF-8" if re.search("UTF-?8", str(error), re.IGNORECASE) else quote
        raise InputError(f"{file.uri} is not a readable CSV file ({error}); {remedy}") from error


#: How files begin that spreadsheets write beside CSV, and what they are.
_NOT_CSV = {
    b"PK\x03\x04": "an Excel or OpenDocument workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    codecs.BOM_UTF16_LE: "UTF-16 text",
    codecs.BOM_UTF16_BE: "UTF-16 text",
}


def _delimiter(file: File) -> str:
    with file.open() as stream:
        try:
            header = stream.readline(BLOCK_BYTES)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file.uri} is truncated or corrupt ({error}); regenerate it") from error
    for mark, what in _NOT_CSV.items():
        if header.startswith(mark):
            raise InputError(f"{file.uri} is {what}, not a CSV file; save the sheet as CSV in UTF-8")
    return next((mark for mark in ",;\t" if mark.encode() in header), ",")


def text_lines(file: File) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank, without a byte order mark (editors on Windows write one)."""
    with file.open() as stream:
        try:
            for number, line in enumerate(stream, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
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


def arrow_records(batches: Iterable[pa.RecordBatch | pa.Table], where: str) -> Iterator[Record]:
    """The rows of Arrow tables. One with a value that Python cannot hold has a fault: text that is not UTF-8, which
    Arrow does not check, or a date outside the years 1 to 9999."""
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
            rows = [_row_or_fault(batch.slice(place, 1)) for place in range(batch.num_rows)]
        for row in rows:
            number += 1
            good = isinstance(row, dict)
            yield Record(f"{where}: row {number}", number, row if good else {}, None if good else row)


def _row_or_fault(one: pa.RecordBatch | pa.Table) -> dict[str, Any] | str:
    for name in one.schema.names:
        try:
            one.select([name]).to_pylist()
        except (ValueError, OverflowError) as error:
            return f"has a value in column {name!r} that cannot be read ({error}); fix or remove the row"
    row: dict[str, Any] = one.to_pylist()[0]
    return row


def sha256(file: File) -> str:
    """Hex digest of a file's bytes, compressed as they are."""
    total = hashlib.sha256()
    with file.open_arrow(compression=None) as stream:
        while block := stream.read(BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()

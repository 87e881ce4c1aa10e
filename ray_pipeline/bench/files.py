"""Reading of the files that public benchmarks come in, from a local path or from the hub.

They are loaded when they are used and are no part of this project: their licences are their own.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.pocket.bench_files import is_pocket, pocket_rows
from ray_pipeline.store.outside import json_value

_HUB = re.compile(r"hf://(datasets|spaces|models)/([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)")


class BenchmarkFileError(ValueError):
    """A benchmark's file is missing or cannot be read. The message names it and the remedy."""


def local_file(source: str) -> Path:
    """The file on this machine behind a source, downloaded once where it is on the hub.

    Args:
        source: a path, or `hf://datasets/OWNER/NAME[@REVISION]/FILE` (also `hf://spaces/…`, `hf://models/…`).

    Raises:
        BenchmarkFileError: the file does not exist, or the Hub cannot be reached.
    """
    if not source.startswith("hf://"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise BenchmarkFileError(f"there is no file {source}")
        return path
    match = _HUB.fullmatch(source)
    if match is None:
        raise BenchmarkFileError(f"{source}: a hub file is written hf://datasets/OWNER/NAME[@REVISION]/FILE")
    kind, repository, revision, name = match.groups()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type=kind.removesuffix("s"), revision=revision))
    except Exception as error:  # The hub's client raises its own, its HTTP library's and the system's.
        raise BenchmarkFileError(
            f"{source} could not be had from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "download it where there is a network and give its path"
        ) from error


def read_text(source: str) -> str:
    """The text of a source; a name that ends in .gz is unpacked."""
    path = local_file(source)
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BenchmarkFileError(f"{source} cannot be read: {error}") from error


def read_rows(source: str) -> list[dict[str, Any]]:
    """Rows of a JSON list of objects, or of a file of one JSON object a line.

    Raises:
        BenchmarkFileError: it is neither, naming the line.
    """
    text = read_text(source)
    if text.lstrip().startswith("["):
        try:
            lines = list(enumerate(json_value(text), 1))
        except ValueError as error:
            raise BenchmarkFileError(f"{source} is not valid JSON: {error}") from error
    else:
        lines = [(n, _line(source, n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for number, row in lines:
        if not isinstance(row, dict):
            raise BenchmarkFileError(f"{source}, row {number}: an object is needed, not {type(row).__name__}")
        found.append(row)
    if not found:
        raise BenchmarkFileError(f"{source} has no rows")
    return found


def _line(source: str, number: int, line: str) -> Any:
    try:
        return json_value(line)
    except ValueError as error:
        raise BenchmarkFileError(f"{source}, line {number} is not valid JSON: {error}") from error


def read_csv(source: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, as text.

    Raises:
        BenchmarkFileError: a row has other than the header's columns.
    """
    rows: list[dict[str, str]] = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(source))), 2):
            if None in row or None in row.values():
                raise BenchmarkFileError(
                    f"{source}, line {number}: the header names {len(row)} columns, the row has others"
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise BenchmarkFileError(f"{source}, row {len(rows) + 1} is not CSV: {error}") from error
    return rows


def need(row: Mapping[str, Any], column: str, source: str, number: int) -> Any:
    """A row's column. Raises BenchmarkFileError, naming the row, where it is missing or null."""
    if row.get(column) is None:
        raise BenchmarkFileError(f"{source}, row {number}: {column} is missing")
    return row[column]


def source_rows(source: str) -> list[dict[str, Any]]:
    """Rows of a question file: a path, hf://datasets/OWNER/NAME[@REVISION]/FILE (also hf://spaces/…), or one that the
    pocket world makes (`pocket:mt_bench`). Raises BenchmarkFileError."""
    if not is_pocket(source):
        return read_rows(source)
    try:
        return pocket_rows(source)
    except ValueError as error:
        raise BenchmarkFileError(str(error)) from error


#: A prompt file of this name is the project's own wording.
OWN = "own"

"""Prompts from JSONL, Parquet and CSV files."""

from __future__ import annotations

import abc
import posixpath
from collections.abc import Collection, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
from pydantic import Field

from ray_pipeline.data.sources.columns import TableSource, check_type
from ray_pipeline.data.sources.files import (
    BLOCK_BYTES,
    File,
    find_files,
    jsonl_records,
    open_parquet,
    parquet_batches,
    sha256,
)
from ray_pipeline.data.sources.source import InputError, SourceRow
from ray_pipeline.extensions import register


class FileSource(TableSource):
    """Rows of one or more files of one format."""

    path: str = Field(description="local path or URI of any pyarrow filesystem; may contain *, ** and ?")

    @property
    def default_label(self) -> str:
        return posixpath.basename(self.path)

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The label in place of the path: files that were moved hold the same prompts, and contents have digests."""
        return {**super().decisive({*exclude, "path"}), "label": self.label_in_tables}

    def rows(self) -> Iterator[SourceRow]:
        for file in find_files(self.path):
            yield from self.file_rows(file)

    def digest(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {file.name: sha256(file) for file in find_files(self.path)}

    @abc.abstractmethod
    def file_rows(self, file: File) -> Iterator[SourceRow]:
        """The rows of one file."""


@register("source", "jsonl")
class JsonlSource(FileSource):
    """JSONL: one object a line; `.gz` and `.zst` too."""

    type: Literal["jsonl"] = Field("jsonl", description="where the rows are: the name of the source")

    def file_rows(self, file: File) -> Iterator[SourceRow]:
        for number, row in jsonl_records(file):
            where = f"{file.uri}: line {number}"
            self.need_columns(where, row)
            yield self.row({"file": file.name, "row": number}, row, where)


@register("source", "parquet")
class ParquetSource(FileSource):
    """Parquet."""

    type: Literal["parquet"] = Field("parquet", description="where the rows are: the name of the source")

    def file_rows(self, file: File) -> Iterator[SourceRow]:
        with open_parquet(file) as table:
            self.need_columns(file.uri, table.schema_arrow.names)
            check_type(file.uri, table.schema_arrow.field(self.column))
            batches = parquet_batches(file, table, self.columns)
            yield from self.arrow_rows(batches, {"file": file.name}, file.uri)


@register("source", "csv")
class CsvSource(FileSource):
    """CSV with a header line."""

    type: Literal["csv"] = Field("csv", description="where the rows are: the name of the source")

    def file_rows(self, file: File) -> Iterator[SourceRow]:
        # Only the wanted columns are converted, all as text: a number further down must not change a column's type.
        read = pacsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)  # with threads, errors name no row
        parse = pacsv.ParseOptions(newlines_in_values=True)
        types = dict.fromkeys(self.columns, pa.string())
        convert = pacsv.ConvertOptions(column_types=types, include_columns=self.columns)
        try:
            with file.open_arrow() as stream:
                header = pacsv.open_csv(stream, read, parse).schema.names
            self.need_columns(file.uri, header)
            with file.open_arrow() as stream:
                batches = pacsv.open_csv(stream, read, parse, convert)
                yield from self.arrow_rows(batches, {"file": file.name}, file.uri)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            message = f"{file.uri} is not a readable CSV file ({error}); quote texts that contain commas"
            raise InputError(message) from error

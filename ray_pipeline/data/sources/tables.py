"""Prompts from JSON, text, Parquet and CSV files."""

from __future__ import annotations

import abc
import posixpath
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ray_pipeline.data.sources.columns import TableSource, check_type, missing_column
from ray_pipeline.data.sources.files import (
    File,
    csv_records,
    find_files,
    json_records,
    open_parquet,
    parquet_batches,
    sha256,
    text_lines,
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
        seen: set[str] = set()
        for file in find_files(self.path):
            yield from self.file_rows(file, seen)
        # A column that some rows lack is fine; one that no row has is a mistake.
        absent = [name for name in self.columns if name not in {*seen, self.column}]
        if seen and absent:
            raise InputError(f"{self.path} {missing_column(absent[0], sorted(seen))}")

    def digest(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {file.name: sha256(file) for file in find_files(self.path)}

    @abc.abstractmethod
    def file_rows(self, file: File, seen: set[str]) -> Iterator[SourceRow]:
        """The rows of one file; its columns are added to `seen`."""


@register("source", "json")
@register("source", "jsonl")
class JsonlSource(FileSource):
    """JSON: one object a line (JSONL), or one array of objects; `.gz` and `.zst` too."""

    type: Annotated[Literal["jsonl"], BeforeValidator(lambda name: "jsonl" if name == "json" else name)] = Field(
        "jsonl", description="where the rows are: the name of the source (or json)"
    )

    def file_rows(self, file: File, seen: set[str]) -> Iterator[SourceRow]:
        for record in json_records(file):
            seen.update(record.row)
            place = {"file": file.name, "row": record.number}
            fault = record.fault
            if fault is None and self.column not in record.row:
                fault = missing_column(self.column, record.row)
            if fault:
                yield SourceRow(place, None, fault=f"{record.where} {fault}")
            else:
                yield self.row(place, record.row, record.where)


@register("source", "text")
class TextSource(FileSource):
    """Text: one prompt a line, blank lines passed over; `.gz` and `.zst` too. Prompts of several lines need JSON."""

    type: Literal["text"] = Field("text", description="where the rows are: the name of the source")
    column: Literal["text"] = Field("text", description="the only column")

    def file_rows(self, file: File, seen: set[str]) -> Iterator[SourceRow]:
        seen.add("text")
        for number, line in text_lines(file):
            place, where = {"file": file.name, "row": number}, f"{file.uri}: line {number}"
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield SourceRow(place, None, fault=f"{where} is not UTF-8 ({error}); fix or remove the line")
            else:
                yield self.row(place, {"text": text}, where)


@register("source", "parquet")
class ParquetSource(FileSource):
    """Parquet."""

    type: Literal["parquet"] = Field("parquet", description="where the rows are: the name of the source")

    def file_rows(self, file: File, seen: set[str]) -> Iterator[SourceRow]:
        with open_parquet(file) as table:
            columns = self.present_columns(file.uri, table.schema_arrow.names, seen)
            check_type(file.uri, table.schema_arrow.field(self.column))
            batches = parquet_batches(file, table, columns)
            yield from self.arrow_rows(batches, {"file": file.name}, file.uri)


@register("source", "csv")
class CsvSource(FileSource):
    """CSV with a header line."""

    type: Literal["csv"] = Field("csv", description="where the rows are: the name of the source")

    def file_rows(self, file: File, seen: set[str]) -> Iterator[SourceRow]:
        for record in csv_records(file, lambda header: self.present_columns(file.uri, header, seen)):
            place = {"file": file.name, "row": record.number}
            if record.fault:
                yield SourceRow(place, None, fault=f"{record.where} {record.fault}")
            else:
                yield self.row(place, record.row, record.where)

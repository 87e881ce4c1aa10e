"""Rows with several columns that matter, such as pairs and completions: from files or a dataset of the Hub, as they
stand. (A prompt source reads one column, see `columns.py`.)
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.sources.files import (
    Record,
    arrow_records,
    csv_records,
    find_files,
    json_records,
    open_parquet,
    parquet_batches,
)
from ray_pipeline.data.sources.huggingface import HubKeys, HuggingFaceSource, hub_place, load_hub
from ray_pipeline.data.sources.source import InputError
from ray_pipeline.data.sources.tables import JsonlSource

Choose = Callable[[Collection[str], bool], list[str]]
"""(columns that are there, whether these are the columns of all rows) → those to read. Raises BadRow when one that is
needed is missing. Of one row only what a row cannot do without is needed; of all rows, every column that was named.
"""


Thoughts = Literal["split", "keep"]


class AnswerTable(Settings):
    """Rows with answers of models, whose thoughts are never judged or trained on unless the user asks for it."""

    thoughts: Thoughts = Field(
        "split",
        description="thoughts at the start of an answer (`<think>…</think>`): split them off, or keep them in the text",
    )


class HubTable(HubKeys, AnswerTable):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets.load_dataset` opens."""

    @property
    def place(self) -> str:
        """The table as messages name it."""
        return hub_place(self.name, self.subset, self.split)

    @property
    def default_label(self) -> str:
        return self._source.default_label

    @property
    def moves(self) -> set[str]:
        """Keys that a moved copy of the same content has other values of."""
        return {"name"} if os.path.isdir(self.name) else set()

    def digests(self) -> dict[str, str]:
        """The commit, or the digest of a local folder. Raises InputError if there is none."""
        return self._source.digest()

    def records(self, choose: Choose, digests: dict[str, str] | None = None) -> Iterator[Record]:
        """The rows, with the chosen columns.

        Args:
            digests: what `digests` returned: the dataset is read at exactly that commit.

        Raises:
            InputError: the dataset cannot be loaded, or has not the columns.
        """
        revision = (digests or {}).get(self.default_label, self.revision)
        data = load_hub(self.name, self.subset, self.split, revision)
        yield from _hub_records(data.select_columns(_columns(choose, data.column_names, self.place)), self.place)

    @property
    def _source(self) -> HuggingFaceSource:
        return HuggingFaceSource(**{key: getattr(self, key) for key in HubKeys.model_fields}, column="")


class FileTable(AnswerTable):
    """Parquet, JSON (one object a line, or an array) or CSV files: a path or URI, which may hold *, ** and ?."""

    type: Literal["parquet", "jsonl", "json", "csv"] = Field(description="where the rows are: the name of the source")
    path: str = Field(description="local path or URI of any pyarrow filesystem; may contain *, ** and ?")

    @property
    def place(self) -> str:
        """The table as messages name it."""
        return self.path

    @property
    def default_label(self) -> str:
        return self._source.default_label

    @property
    def moves(self) -> set[str]:
        """Keys that a moved copy of the same content has other values of."""
        return {"path"}

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file. Raises InputError if there is none."""
        return self._source.digest()

    def records(self, choose: Choose, digests: dict[str, str] | None = None) -> Iterator[Record]:
        """The rows, with the chosen columns; a JSON row without one that it needs has a fault.

        Raises:
            InputError: a file cannot be read, or a column is missing from all rows.
        """
        seen: dict[str, None] = {}  # a set, in order
        for file in find_files(self.path):
            if self.type == "parquet":
                with open_parquet(file) as table:
                    columns = _columns(choose, table.schema_arrow.names, file.uri)
                    batches = parquet_batches(file, table, columns)
                    yield from arrow_records(batches, file.uri)
            elif self.type == "csv":
                yield from csv_records(file, functools.partial(_columns, choose, where=file.uri))
            else:
                for record in json_records(file):
                    seen |= dict.fromkeys(record.row)
                    try:
                        columns = [] if record.fault else choose(record.row, False)
                        yield dataclasses.replace(record, row={name: record.row.get(name) for name in columns})
                    except BadRow as fault:
                        yield dataclasses.replace(record, row={}, fault=str(fault))
        if seen:
            _columns(choose, list(seen), self.path)

    @property
    def _source(self) -> JsonlSource:
        return JsonlSource(path=self.path, column="")


def _hub_records(data: Any, where: str) -> Iterator[Record]:
    """The rows of a `datasets.Dataset` as Python values, of which `datasets` decodes some itself, and not as Arrow. One
    with a value that Python cannot hold has a fault, as in `arrow_records`."""
    rows = iter(data)
    for number in range(1, len(data) + 1):
        place = f"{where}: row {number}"
        try:
            record = Record(place, number, next(rows))
        except (ValueError, OverflowError) as error:
            rows = iter(data.skip(number))  # an iterator that has raised is at its end
            (found,) = arrow_records([data.with_format("arrow")[number - 1 : number]], where)
            record = Record(place, number, {}, found.fault or f"cannot be read ({error}); fix or remove the row")
        yield record


def _columns(choose: Choose, present: Collection[str], where: str) -> list[str]:
    """The columns to read from all rows. Raises InputError where one that is needed is in none of them."""
    try:
        return choose(present, True)
    except BadRow as fault:
        raise InputError(f"{where} {fault}") from fault

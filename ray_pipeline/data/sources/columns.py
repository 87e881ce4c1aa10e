"""Sources that are tables: which columns are read, and how a row becomes a prompt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.data.sources.source import InputError, PromptSource, SourceRow

#: JSON can hold "\\ud83d" without its second half; no UTF-8 file can.


class TableSource(PromptSource):
    """What every source of rows and columns has."""

    column: str = Field(
        description="the prompt: text, or a list of chat messages (role, content), cut after its last user turn"
    )
    system: str | None = Field(None, description="system message for rows that bring none of their own")
    task_type_column: str | None = Field(None, description='column with the kind of task; default: "general"')
    source_column: str | None = Field(None, description="column with the origin of a row; default: `label`")
    label: str | None = Field(
        None, description="name of the source in the tables; default: the name of the dataset or file"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of distinct prompts (smallest hashes kept)")

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        names = (self.column, self.task_type_column, self.source_column)
        return list(dict.fromkeys(name for name in names if name is not None))

    def arrow_rows(
        self, batches: Iterable[pa.RecordBatch | pa.Table], place: dict[str, Any], where: str
    ) -> Iterator[SourceRow]:
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield self.row({**place, "row": number}, row, f"{where}: row {number}")

    def row(self, place: dict[str, Any], row: dict[str, Any], where: str) -> SourceRow:
        """Check one row's prompt; other columns are taken as text, whatever they are."""
        value = row[self.column]
        if value is not None and not isinstance(value, str):
            value = _messages(value, f"{where}: column {self.column!r}")
        task_type, source = (
            None if name is None or row.get(name) is None else str(row[name])
            for name in (self.task_type_column, self.source_column)
        )
        return SourceRow(place, value, task_type, source, self.system)

    def need_columns(self, where: str, present: Iterable[str]) -> None:
        """Raises InputError for a column that is not there, with the nearest ones."""
        present = list(present)
        for name in self.columns:
            if name in present:
                continue
            folded = {column.casefold(): column for column in present}
            near = [folded[c] for c in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)]
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(present) or 'none'}"
            raise InputError(f"{where} has no column {name!r}; {hint}")


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """A chat that ends with a user turn: answers that it came with are cut off. [] when no user turn is in it."""
    if not isinstance(value, list):
        raise InputError(f"{where} holds a {type(value).__name__}, but a prompt is text or a list of chat messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: message {position} has no role and content; rename its keys to these two")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise InputError(f"{where}: message {position} must have text as role and content")
    end = len(value)
    while end and value[end - 1]["role"].strip().lower() != "user":
        end -= 1
    return [{"role": m["role"], "content": m["content"]} for m in value[:end]]


def check_type(where: str, field: pa.Field) -> None:
    """A column must be text, chat messages, or without any value (its rows are dropped as empty)."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    messages = lists and (pa.types.is_struct(kind.value_type) or pa.types.is_null(kind.value_type))
    if not (text or messages or pa.types.is_null(kind)):
        raise InputError(
            f"{where}: column {field.name!r} is {field.type}, but a prompt is text or a list of chat messages; "
            "choose another column"
        )

"""Sources that are tables: which columns are read, and how a row becomes a prompt."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.config.settings import repeated
from ray_pipeline.data.sources.chats import BadRow, messages_of, turns_in_text, until_last_user
from ray_pipeline.data.sources.files import arrow_records
from ray_pipeline.data.sources.source import InputError, PromptSource, SourceRow
from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.outside import storable_value


class TableSource(PromptSource):
    """What every source of rows and columns has."""

    column: str = Field(
        description="the prompt: text, or chat messages in any usual form (`role` and `content`, ShareGPT, JSON text, "
        "HelpSteer2's marks), cut after the last user turn"
    )
    input_column: str | None = Field(
        None, description="column with more text of the prompt, put behind it after a blank line (Alpaca's `input`)"
    )
    system: str | None = Field(None, description="system message for rows that bring none of their own")
    task_type_column: str | None = Field(None, description='column with the kind of task; default: "general"')
    source_column: str | None = Field(None, description="column with the origin of a row; default: `label`")
    meta_columns: tuple[str, ...] = Field(
        (),
        description="columns that are kept in the prompt's `meta` for checkers: `answer` for the checker `answer`, "
        "`instruction_id_list` and `kwargs` for `ifeval`",
    )
    label: str | None = Field(
        None, description="name of the source in the tables; default: the name of the dataset or file"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of distinct prompts (smallest hashes kept)")
    license: str | None = Field(None, description="licence of the prompts, for the dataset card; default: unknown")

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        return super().decisive({*exclude, "license"})

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        names = (self.column, self.input_column, self.task_type_column, self.source_column, *self.meta_columns)
        return list(dict.fromkeys(name for name in names if name is not None))

    def arrow_rows(
        self, batches: Iterable[pa.RecordBatch | pa.Table], place: dict[str, Any], where: str
    ) -> Iterator[SourceRow]:
        for record in arrow_records(batches, where):
            here = {**place, "row": record.number}
            if record.fault:
                yield SourceRow(here, None, fault=f"{record.where} {record.fault}")
            else:
                yield self.row(here, record.row, record.where)

    def row(self, place: dict[str, Any], row: dict[str, Any], where: str) -> SourceRow:
        """One row's prompt, or the fault in it; other columns are taken as text, whatever they are."""
        try:
            value = _prompt(row[self.column])
        except BadRow as fault:
            return SourceRow(place, None, fault=f"{where}: column {self.column!r}: {fault}")
        more = row.get(self.input_column) if self.input_column else None
        if isinstance(value, str) and isinstance(more, str) and more.strip():  # where there is none: null, NaN or ""
            value = f"{value}\n\n{more}"
        task_type, source = (
            None if name is None or row.get(name) is None else str(row[name])
            for name in (self.task_type_column, self.source_column)
        )
        try:
            meta = meta_of(row, self.meta_columns)
        except BadRow as fault:
            return SourceRow(place, None, fault=f"{where}: {fault}")
        return SourceRow({**meta, **place}, value, task_type, source, self.system)

    def present_columns(self, where: str, present: Collection[str], seen: set[str]) -> list[str]:
        """Those of `columns` that are there; all that are there join `seen`. Raises InputError without the prompt's, or
        with one of them twice: a row has room for the last only."""
        if self.column not in present:
            raise InputError(f"{where} {missing_column(self.column, present)}")
        if twice := set(repeated(present)) & set(self.columns):
            raise InputError(f"{where} has several columns named {min(twice)!r}; rename all but one")
        seen.update(present)
        return [name for name in self.columns if name in present]


def meta_of(row: Mapping[str, Any], columns: Collection[str]) -> dict[str, Any]:
    """The values of some columns for a prompt's `meta`; null ones are left out. Raises BadRow if one is no JSON."""
    meta = {name: storable_value(row[name]) for name in columns if row.get(name) is not None}
    try:
        canonical_json(meta)
    except (TypeError, ValueError) as error:
        raise BadRow(f"meta_columns: a value is no JSON ({error})") from error
    return meta


def missing_column(name: str, present: Collection[str]) -> str:
    """What to report about a column that is not there: the nearest ones, or all."""
    folded = {column.casefold(): column for column in present}
    near = [folded[c] for c in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(present) or 'none'}"
    return f"has no column {name!r}; {hint}"


def _prompt(value: Any) -> str | list[dict[str, str]] | None:
    """A value as it stands in a source; of a chat what precedes the answer. Raises BadRow if it is no prompt."""
    if value is None:
        return None
    turns = turns_in_text(value) if isinstance(value, str) else messages_of(value)
    return value if turns is None else until_last_user(turns)


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

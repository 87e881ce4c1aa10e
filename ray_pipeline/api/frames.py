"""Frames in and out: a pandas DataFrame returns a DataFrame, an Arrow table returns a table.

Rows are joined by id. In a frame without ids they are derived from the content: equal prompts and responses have equal
ids in every function, so that any frame can be judged, critiqued and gated unchanged.
"""

from __future__ import annotations

import collections
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.sources.chats import messages_of as chat_messages
from ray_pipeline.engines.thoughts import answer_of
from ray_pipeline.store.keys import digest, prompt_id
from ray_pipeline.store.schemas import CANDIDATES

if TYPE_CHECKING:
    import pandas as pd

    from ray_pipeline.data.sources.records import Thoughts

Frame = TypeVar("Frame", "pd.DataFrame", pa.Table)


class ColumnError(ValueError):
    """A frame lacks a column; the message has its name and the existing columns."""


def is_pandas(frame: Any) -> bool:
    """Whether it is a pandas DataFrame; does not import pandas, which Arrow users may not need."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(frame, pandas.DataFrame)


def column_names(frame: Any, what: str) -> list[str]:
    """Column names. Raises TypeError for anything but a DataFrame or an Arrow table."""
    if is_pandas(frame):
        return [str(name) for name in frame.columns]
    if isinstance(frame, pa.Table):
        return list(frame.column_names)
    raise TypeError(f"{what} must be a pandas DataFrame or a pyarrow Table, not {type(frame).__name__}")


def need(frame: Any, columns: Sequence[str], what: str) -> None:
    """Raise ColumnError for the first missing column."""
    present = column_names(frame, what)
    for name in columns:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ColumnError(f"{what} has no column {name!r}; it has {', '.join(present) or 'none'}{hint}")


def table_of(frame: Any, columns: Sequence[str], what: str, schema: pa.Schema | None = None) -> pa.Table:
    """The named columns as an Arrow table, with the types of `schema` where it has them.

    Raises:
        ColumnError: a column is missing.
        ValueError: a column has values of another type.
    """
    need(frame, columns, what)
    types = None if schema is None else pa.schema([schema.field(name).with_nullable(True) for name in columns])
    try:
        if is_pandas(frame):
            return pa.Table.from_pandas(frame[list(columns)], schema=types, preserve_index=False)
        table = frame.select(list(columns))
        return table if types is None else table.cast(types)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{what}: {error}; check the types of {', '.join(columns)}") from error


def give(table: pa.Table, like: Frame, *, same_rows: bool = False) -> Frame:
    """A table, converted to the type of the input frame.

    Args:
        same_rows: row i belongs to row i of `like`: a DataFrame then gets its index, so that the two can be joined.
    """
    if not is_pandas(like):
        return table
    frame = table.to_pandas()
    return frame.set_index(like.index) if same_rows else frame


def messages_of(prompt: Any, row: int, what: str) -> list[dict[str, str]]:
    """A prompt as chat messages.

    Raises:
        ValueError: the prompt is neither text nor a list of messages with role and content.
    """
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise ValueError(
            f"{what}, row {row}: invalid prompt {prompt!r}; use text or a list of messages with role and content"
        )
    try:
        return chat_messages(prompt)
    except BadRow as fault:
        raise ValueError(f"{what}, row {row}: {fault}") from fault


def rows_of_prompts(frame: Any, columns: Sequence[str], what: str) -> list[dict[str, Any]]:
    """Rows with `messages`, `prompt_id` and the named columns. The prompt is in the column `prompt` or `messages`."""
    present = column_names(frame, what)
    source = "messages" if "messages" in present and "prompt" not in present else "prompt"
    kept = [name for name in ("prompt_id",) if name in present]
    rows = table_of(frame, [source, *columns, *kept], what).to_pylist()
    found = []
    for number, row in enumerate(rows):
        messages = messages_of(row[source], number, what)
        found.append({**row, "messages": messages, "prompt_id": row.get("prompt_id") or prompt_id(messages)})
    return found


def rows_with_ids(
    frame: Any, key: str, answers: Sequence[str], what: str, also: Sequence[str] = (), thoughts: Thoughts = "keep"
) -> list[dict[str, Any]]:
    """Rows of prompts and answers, each with an id under `key`: the frame's own column, or derived from the content.

    Args:
        answers: columns of the answers, which are part of a derived id.
        also: further columns.
        thoughts: split: answers are without the thoughts before them, and None if they end within them. Ids are those
            of the texts as they stood.
    """
    kept = [key] if key in column_names(frame, what) else []
    rows = rows_of_prompts(frame, [*answers, *also, *kept], what)
    times: collections.Counter[str] = collections.Counter()
    for row in rows:
        if not kept:
            content = [row["prompt_id"], *(row[name] for name in answers)]
            one = digest(["row", *content])
            row[key] = digest(["row", *content, times[one]])  # repeated rows get different ids
            times[one] += 1
        if thoughts == "split":
            row.update({name: answer_of(row[name]) for name in answers})
    return rows


def id_table(candidates: Any) -> pa.Table:
    """`candidate_id` and `prompt_id` of a frame of candidates, its own or derived from prompt and response, and
    `finish_reason` if it is there."""
    present, ids, end = column_names(candidates, "candidates"), ["candidate_id", "prompt_id"], "finish_reason"
    if set(ids) <= set(present):
        table = table_of(candidates, ids, "candidates")
    else:
        rows = rows_with_ids(candidates, "candidate_id", ["response"], "candidates")
        table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in ids})
    if end not in present:
        return table
    return table.append_column(end, table_of(candidates, [end], "candidates", CANDIDATES)[end])

"""Preference data made elsewhere: Hub datasets and files in TRL's standard formats.

    paired          prompt, chosen, rejected       (prompt may be inside chosen and rejected, as whole conversations)
    unpaired        prompt, completion, label      (label: true or false)
    demonstrations  prompt, completion; or messages

Texts are strings or lists of chat messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import (
    HuggingFaceSource,
    InputError,
    JsonlSource,
    ParquetSource,
    find_files,
    hub_place,
    jsonl_records,
    load_hub,
    open_parquet,
    parquet_batches,
)

Format = Literal["paired", "unpaired", "demonstrations"]


class _Rows(Settings):
    """Keys of every source. Columns have TRL's names by default."""

    format: Format = Field("paired", description="layout of the rows: paired, unpaired or demonstrations")
    prompt: str = Field("prompt", description="column with the prompt")
    chosen: str = Field("chosen", description="column with the better answer")
    rejected: str = Field("rejected", description="column with the worse answer")
    completion: str = Field("completion", description="column with the answer")
    label: str = Field("label", description="column with the label: whether the answer is desirable")
    messages: str = Field("messages", description="column with the whole chat")
    chosen_score: str | None = Field(
        None, description="columns with scores of a pair, if it has some; a gap of 0 or less drops the pair"
    )
    rejected_score: str | None = Field(
        None, description="columns with scores of a pair, if it has some; a gap of 0 or less drops the pair"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of rows (the first ones are kept)")
    license: str = Field("other", description="for the dataset card, as the Hub spells it")


class HubPreferences(_Rows):
    """A dataset of the Hugging Face Hub, such as HuggingFaceH4/ultrafeedback_binarized (split train_prefs)."""

    type: Literal["huggingface"] = Field("huggingface", description="where the rows are: the name of the source")
    name: str = Field(description="name in the tables")
    subset: str | None = Field(None, description="configuration of the dataset; default: its default one")
    split: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest commit of main")


class FilePreferences(_Rows):
    """Parquet or JSONL files: a path or URI, which may hold *, ** and ?."""

    type: Literal["parquet", "jsonl"] = Field(description="where the rows are: the name of the source")
    path: str = Field(description="local path or URI of any pyarrow filesystem; may contain *, ** and ?")


PreferenceSource = Annotated[HubPreferences | FilePreferences, Field(discriminator="type")]


def source_digests(source: PreferenceSource) -> dict[str, str]:
    """Commit of a Hub dataset, or digest of each file. Raises InputError if there is none."""
    if isinstance(source, HubPreferences):
        place = {"name": source.name, "subset": source.subset, "split": source.split, "revision": source.revision}
        return HuggingFaceSource(**place, column="").digest()
    kind = ParquetSource if source.type == "parquet" else JsonlSource
    return kind(path=source.path, column="").digest()


def source_place(source: PreferenceSource) -> str:
    if isinstance(source, HubPreferences):
        return hub_place(source.name, source.subset, source.split)
    return source.path


def source_records(source: PreferenceSource, commit: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in enumerate(_all_records(source, commit)):
        if source.limit is not None and number >= source.limit:
            return
        yield record


def _all_records(source: PreferenceSource, commit: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Location of each row, and its columns; only the needed ones are loaded."""
    if isinstance(source, HubPreferences):
        where = source_place(source)
        data = load_hub(source.name, source.subset, source.split, commit or source.revision)
        columns = _columns(source, data.column_names, where)
        for number, row in enumerate(data.select_columns(columns), 1):
            yield f"{where}: row {number}", cast(dict[str, Any], row)
        return
    for file in find_files(source.path):
        number = 0
        if source.type == "parquet":
            with open_parquet(file) as table:
                columns = _columns(source, table.schema_arrow.names, file.uri)
                for batch in parquet_batches(file, table, columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file.uri}: row {number}", row
        else:
            for number, row in jsonl_records(file):
                where = f"{file.uri}: line {number}"
                yield where, {name: row.get(name) for name in _columns(source, list(row), where)}


def _columns(source: PreferenceSource, present: Sequence[str], where: str) -> list[str]:
    """The columns to read. Raises InputError if a column of the format is missing, with the existing ones."""
    needed = {
        "paired": [source.chosen, source.rejected],
        "unpaired": [source.prompt, source.completion, source.label],
        "demonstrations": [source.messages] if source.messages in present else [source.prompt, source.completion],
    }[source.format]
    needed += [name for name in (source.chosen_score, source.rejected_score) if name is not None]
    missing = [name for name in needed if name not in present]
    if missing:
        raise InputError(
            f"{where} has no column {missing[0]!r}, which {source.format} rows need; it has "
            f"{', '.join(present) or 'none'}. Set the right one in the source, or choose another format"
        )
    return needed + ([source.prompt] if source.format == "paired" and source.prompt in present else [])

"""Where prompts come from: datasets of the Hugging Face Hub, JSON, text, Parquet and CSV files, the pocket world,
instructions with verifiable constraints, and what a user registers.

Every source is a `PromptSource`: a stream of rows (text or chat messages, and where they stood), and a digest of its
content that goes into the fingerprint of the prompts stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from ray_pipeline.data.sources.constrained import ConstrainedSource
from ray_pipeline.data.sources.files import (
    File,
    Record,
    find_files,
    json_records,
    jsonl_records,
    open_parquet,
    parquet_batches,
)
from ray_pipeline.data.sources.huggingface import HuggingFaceSource, hub_place, load_hub
from ray_pipeline.data.sources.pocket import PocketSource
from ray_pipeline.data.sources.records import FileTable, HubTable
from ray_pipeline.data.sources.source import InputError, PromptSource, SourceRow, source_from
from ray_pipeline.data.sources.tables import CsvSource, JsonlSource, ParquetSource, TextSource

__all__ = [
    "ConstrainedSource",
    "CsvSource",
    "File",
    "FileTable",
    "HubTable",
    "HuggingFaceSource",
    "InputError",
    "JsonlSource",
    "ParquetSource",
    "PocketSource",
    "PromptSource",
    "Record",
    "Source",
    "SourceRow",
    "TextSource",
    "digests_of",
    "find_files",
    "hub_place",
    "json_records",
    "jsonl_records",
    "load_hub",
    "named_sources",
    "open_parquet",
    "parquet_batches",
    "pinned",
    "source_from",
]

_BUILT_IN = HuggingFaceSource | JsonlSource | ParquetSource | CsvSource | TextSource | PocketSource | ConstrainedSource

#: Any source by its `type`. Quorum's own are named for messages and for editors; others are found in the registry.
Source = Annotated[
    SerializeAsAny[_BUILT_IN | PromptSource], BeforeValidator(source_from, json_schema_input_type=_BUILT_IN)
]


def named_sources(sources: Sequence[PromptSource]) -> list[tuple[str, PromptSource]]:
    """Each source with a name that no other has: its label, numbered where two share one."""
    names: list[str] = []
    for source in sources:
        label = source.label_in_tables
        taken = sum(1 for n in names if n == label or n.startswith(f"{label} #"))
        names.append(label if not taken else f"{label} #{taken + 1}")
    return list(zip(names, sources, strict=True))


def digests_of(named: Sequence[tuple[str, PromptSource]]) -> dict[str, str]:
    """Content digest of every part of every source, for a fingerprint.

    Raises:
        InputError: a source cannot be found.
    """
    return {
        name if name == part else f"{name}: {part}": value
        for name, source in named
        for part, value in source.digest().items()
    }


def pinned(
    named: Sequence[tuple[str, PromptSource]], digests: Mapping[str, str] | None
) -> list[tuple[str, PromptSource]]:
    """The sources at the content of `digests_of`, where that can be chosen; without digests, as they are."""
    if digests is None:
        return list(named)
    return [(name, source.pinned(_own(name, digests))) for name, source in named]


def _own(name: str, digests: Mapping[str, str]) -> dict[str, str]:
    """The digests of one source by part."""
    before = f"{name}: "
    own = {key.removeprefix(before): value for key, value in digests.items() if key.startswith(before)}
    return own | {name: digests[name]} if name in digests else own

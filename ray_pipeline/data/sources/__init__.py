"""Where prompts come from: datasets of the Hugging Face Hub, JSON, text, Parquet and CSV files, the pocket world,
instructions with verifiable constraints, and what a user registers.

Every source is a `PromptSource`: a stream of rows (text or chat messages, and where they stood), and a digest of its
content that goes into the fingerprint of the prompts stage.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "find_files",
    "hub_place",
    "json_records",
    "jsonl_records",
    "load_hub",
    "named_sources",
    "open_parquet",
    "parquet_batches",
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

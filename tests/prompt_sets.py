"""The prompts of a run as one table in memory, which a run itself writes shard by shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.data.prompts import PromptsConfig, read_prompts


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """What `read_prompts` writes and returns."""

    table: pa.Table
    counts: dict[str, Any]
    faults: list[str]


def load_prompts(config: PromptsConfig, digests: Mapping[str, str] | None = None) -> PromptSet:
    """Args and Raises: as `read_prompts`."""
    parts: list[pa.Table] = []
    counts, faults, _ = read_prompts(config, lambda _, part: parts.append(part), 1, digests)
    return PromptSet(parts[0], counts, faults)

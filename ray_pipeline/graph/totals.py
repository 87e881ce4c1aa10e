"""What a stage reads and what its shards add up to, whoever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.graph.shard_map import receipt_name
from ray_pipeline.graph.stage import StageResult, StageStop
from ray_pipeline.store.files import Folder
from ray_pipeline.store.tables import ShardedTable

_USAGE = ("seconds", "calls_engine", "calls_log", "calls_shared", "prompt_tokens", "completion_tokens", "cached_tokens")


def tables_by_role(parents: Mapping[str, StageResult]) -> dict[str, ShardedTable]:
    """The tables of the stages that a stage reads: by role, or `role.kind` where a stage writes several."""
    found: dict[str, ShardedTable] = {}
    for role, parent in parents.items():
        for kind in parent.tables:
            found[role if len(parent.tables) == 1 else f"{role}.{kind}"] = parent.table(kind)
    return found


def rows_of_tables(stage: str, outputs: Mapping[str, ShardedTable]) -> dict[str, int]:
    """Rows of every kind. Raises StageStop when a shard is not there, naming it."""
    rows: dict[str, int] = {}
    for kind, table in outputs.items():
        state = table.state()
        if state.missing:
            raise StageStop(f"{stage}: shards {state.missing[:8]} of {kind} are not there after the stage; run again")
        rows[kind] = sum(state.rows.values())
    return rows


def receipts_of(folder: Folder, num_shards: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Facts (counts that add up over shards) and usage of a stage whose shards are all there."""
    counts: dict[str, int] = {}
    usage = dict.fromkeys(_USAGE, 0.0)
    for shard in range(num_shards):
        receipt = (folder / "_receipts").read_json(receipt_name(shard))
        for name, count in receipt["counts"].items():
            counts[name] = counts.get(name, 0) + count
        for name, value in receipt["usage"].items():
            usage[name] = usage.get(name, 0.0) + value
    return {"counts": dict(sorted(counts.items()))}, usage

"""How a workflow is run, from its configuration: for `quorum run`, for the probe of a plan, for a retry."""

from __future__ import annotations

from typing import Any

from ray_pipeline.graph.reach import wanted_keys
from ray_pipeline.graph.run import RunSettings
from ray_pipeline.operate.prices import budget_of
from ray_pipeline.workflow.config import RunConfig


def run_settings(config: RunConfig, folder: str, **other: Any) -> RunSettings:
    """
    Args:
        folder: of the run; absolute path or URI.
        other: further fields of RunSettings, which win.
    """
    given: dict[str, Any] = {
        "folder": folder,
        "calls_root": config.calls_root(folder),
        "num_shards": config.num_shards,
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_unset=True),
        "ray": config.ray.arguments(),
        "report": config.page().model_dump(mode="json"),
        "replay_only": config.calls.replay_only,
        "max_stages": config.ray.max_stages,
        "tables": config.ray.tables.room(),
        "failure": config.failure,
        "keys": wanted_keys(config.served()),
        "budget": budget_of(config, None, None),
    }
    return RunSettings(**(given | other))

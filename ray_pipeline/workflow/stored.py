"""The configuration of a stored run, typed by its workflow."""

from __future__ import annotations

from collections.abc import Sequence

from ray_pipeline.config.loading import read_config
from ray_pipeline.graph.results import Run
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.registry import find_workflow


def config_of(run: Run, overrides: Sequence[str] = (), source: str | None = None) -> RunConfig:
    """The configuration of a stored run, an instance of its workflow's class, with overrides as `key=value`.

    Args:
        source: named in errors; default: the manifest.

    Raises:
        ConfigError: unknown workflow, or a key or value that this version does not accept.
    """
    kind: type[RunConfig] = find_workflow(run.reference).config
    return read_config(kind, run.given or run.config, overrides, source or run.manifest)

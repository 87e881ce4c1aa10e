"""The configuration of a stored run, typed by its workflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    return read_config(kind, _of_this_version(run.given or run.config), overrides, source or run.manifest)


def _of_this_version(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stored values with `train.global_batch` in place of the `train.gradient_accumulation` of earlier versions.

    A new configuration with that key is refused, since it made the rows of a step depend on the number of workers; a
    finished run is still audited and regated.
    """
    train = values.get("train")
    if not isinstance(train, Mapping) or "gradient_accumulation" not in train:
        return values
    kept = {key: value for key, value in train.items() if key != "gradient_accumulation"}
    workers, rows = kept.get("num_workers", 1), kept.get("batch_size", 2)
    return {**values, "train": {**kept, "global_batch": workers * rows * train["gradient_accumulation"]}}

"""A stored run with its workflow, which types its configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Generic

from ray_pipeline.config.loading import read_config
from ray_pipeline.graph.results import Run, read_run
from ray_pipeline.workflow.registry import C, Workflow, find_workflow


@dataclasses.dataclass(frozen=True)
class StoredRun(Generic[C]):
    """A stored run of a workflow whose configurations are of class C."""

    run: Run
    workflow: Workflow[C]

    @functools.cached_property
    def config(self) -> C:
        """The configuration that it was made with. Raises as `changed`."""
        return self.changed()

    def changed(self, overrides: Sequence[str] = (), source: str | None = None) -> C:
        """Its configuration with overrides as `key=value`.

        Args:
            source: named in errors; default: the manifest.

        Raises:
            ConfigError: a key or value that this version does not accept.
        """
        run = self.run
        values = _of_this_version(run.given or run.config)
        return read_config(self.workflow.config, values, overrides, source or run.manifest)


def stored(run: Run) -> StoredRun[Any]:
    """A run with its workflow. Raises ConfigError for an unknown one."""
    return StoredRun(run, find_workflow(run.reference))


def read_stored(location: str) -> StoredRun[Any]:
    """The run in a folder, with its workflow.

    Raises:
        StoreError: the folder holds no run.
        ConfigError: unknown workflow.
    """
    return stored(read_run(location))


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

"""The data that a comparison reads of each run: its manifest and the numbers of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_pipeline.graph.results import Run
from ray_pipeline.store.errors import DamagedFile, StoreError
from ray_pipeline.workflow.registry import find_workflow

if TYPE_CHECKING:
    from ray_pipeline.operate.side_by_side import Side


def side_of(run: Run) -> Side:
    """One side of `quorum compare`.

    Raises:
        StoreError: the run has no report yet; the message says how to write one.
    """
    from ray_pipeline.operate.side_by_side import Side

    numbers = find_workflow(run.reference).numbers
    if numbers is None:
        raise StoreError(f"{run.folder.location}: runs of {run.workflow} cannot be compared")
    name = f"report/{numbers}"
    try:
        metrics: dict[str, Any] = run.folder.read_json(name)
    except FileNotFoundError as error:
        message = f"{run.folder.location} has no {name}; run `quorum report {run.folder.location}` to write it"
        raise StoreError(message) from error
    except DamagedFile as error:
        message = f"{run.folder.uri(name)} is not valid JSON; run `quorum report {run.folder.location}` to rebuild it"
        raise StoreError(message) from error
    return Side(
        name=run.name,
        folder=run.folder.location,
        workflow=run.workflow,
        config=run.config,
        fingerprints={stage: result.fingerprint for stage, result in run.results.items()},
        usage={stage: result.usage.plain() for stage, result in run.results.items()},
        metrics=metrics,
    )

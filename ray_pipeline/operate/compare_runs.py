"""What a comparison of two runs reads of each: manifest and the numbers of its report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray_pipeline.graph.results import Run
from ray_pipeline.store.files import StoreError
from ray_pipeline.workflow.registry import find_workflow

if TYPE_CHECKING:
    from ray_pipeline.operate.side_by_side import Side


def side_of(run: Run) -> Side:
    """One side of `quorum compare`.

    Raises:
        StoreError: the run has no report yet, saying how to write one.
    """
    from ray_pipeline.operate.side_by_side import Side

    numbers = find_workflow(run.reference).numbers
    if numbers is None:
        raise StoreError(f"{run.folder.location} is a run of {run.workflow}, whose runs cannot be compared")
    name = f"report/{numbers}"
    try:
        metrics: dict[str, Any] = run.folder.read_json(name)
    except FileNotFoundError as error:
        told = f"{run.folder.location} has no {name}; `quorum report {run.folder.location}` writes it"
        raise StoreError(told) from error
    except json.JSONDecodeError as error:
        told = f"{run.folder.uri(name)} is no JSON; `quorum report {run.folder.location}` writes it anew"
        raise StoreError(told) from error
    return Side(
        name=run.name,
        folder=run.folder.location,
        workflow=run.workflow,
        config=run.config,
        fingerprints={stage: result.fingerprint for stage, result in run.results.items()},
        usage={stage: result.usage.plain() for stage, result in run.results.items()},
        metrics=metrics,
    )

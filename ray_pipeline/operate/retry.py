"""Failed and quarantined shards once more, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ray_pipeline.graph.failures import read_failures
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.run import RunSettings, execute
from ray_pipeline.graph.stage import Dag
from ray_pipeline.store.files import StoreError

Failed = dict[str, tuple[int, ...]]


def failed_shards(run: Run) -> Failed:
    """Stage → its failed and quarantined shards, of the stages that the manifest names and that are not done."""
    found: Failed = {}
    for name, entry in run.manifest["stages"].items():
        if entry["status"] == "done":
            continue
        if shards := read_failures(run.folder / entry["path"]):
            found[name] = tuple(sorted(shards))
    return found


def retry_shards(run: Run, dag: Dag, settings: Any, failed: Failed, console: Console) -> list[str]:
    """Make these shards. Returns what is still wrong, a line a stage.

    Args:
        dag: as the run's configuration wires it.
        settings: that configuration.

    Raises:
        StoreError: the configuration gives a failed stage another fingerprint, so its shards are not this run's.
        RunBusy: the run is being worked on.
    """
    stages = {stage.name: stage for stage in dag.stages}
    for name in failed:
        entry = run.manifest["stages"][name]
        if name not in stages or stages[name].fingerprint != entry["fingerprint"]:
            raise StoreError(
                f"{run.folder.location}: with this configuration {name} is another stage than the one whose shards "
                "failed; leave out what changes its output, or use `quorum run`"
            )
    groups = [g for g in dag.groups if any(stages[name].group_name == g for name in failed)]
    problems: list[str] = []
    for group in groups:
        outcome = execute(dag, _settings(run, settings, failed), to_group=group, console=console)
        problems += [f"{name}: {failure.reason}" for name, failure in outcome.failures.items()]
        if problems:
            break
    return problems


def _settings(run: Run, settings: Any, failed: Mapping[str, tuple[int, ...]]) -> RunSettings:
    folder = run.folder.location
    return RunSettings(
        folder=folder,
        calls_root=settings.calls_root(folder),
        num_shards=settings.num_shards,
        config=settings.model_dump(mode="json"),
        ray=settings.ray.arguments(),
        report=settings.page().model_dump(mode="json"),
        max_stages=settings.ray.max_stages,
        failure=settings.failure,
        only=failed,
        lift_quarantine=True,
    )

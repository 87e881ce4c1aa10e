"""Failed and quarantined shards once more, and no others."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ray_pipeline.graph.driver import execute
from ray_pipeline.graph.failures import read_failures
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.stage import Dag
from ray_pipeline.operate.run_settings import executor_of, run_settings
from ray_pipeline.store.files import StoreError

Failed = dict[str, tuple[int, ...]]


def failed_shards(run: Run) -> Failed:
    """Stage → its failed and quarantined shards, of the stages that the manifest names and that are not done."""
    found: Failed = {}
    for name, stage in run.stages.items():
        if not stage.done and (shards := read_failures(run.folder / stage.path)):
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
        if name not in stages or stages[name].fingerprint != run.stages[name].fingerprint:
            raise StoreError(
                f"{run.folder.location}: with this configuration {name} is another stage than the one whose shards "
                "failed; leave out what changes its output, or use `quorum run`"
            )
    how = run_settings(settings, run.folder.location, workflow=run.reference, only=failed, lift_quarantine=True)
    groups = [g for g in dag.groups if any(stages[name].group_name == g for name in failed)]
    problems: list[str] = []
    for group in groups:
        outcome = execute(dag, how, executor_of(settings), to_group=group, console=console)
        for name in (name for name in failed if stages[name].group_name == group):
            if name in outcome.not_run:
                problems.append(f"{name}: a stage that it reads is not done; `quorum run` makes it")
            elif name in outcome.failures and read_failures(stage_folder(run.folder.location, stages[name])):
                problems.append(f"{name}: {outcome.failures[name].reason}")
        if problems:
            break
    return problems

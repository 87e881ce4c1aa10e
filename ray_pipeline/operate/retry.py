"""Retrying the failed and quarantined shards of a run, and no others."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ray_pipeline.graph.driver import execute
from ray_pipeline.graph.failures import ShardFailure, read_failures
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.stage import Dag
from ray_pipeline.operate.run_settings import executor_of, run_settings
from ray_pipeline.store.errors import StoreError

Failed = dict[str, dict[int, ShardFailure]]


def failed_shards(run: Run) -> Failed:
    """Stage → its failed and quarantined shards by number, for the stages in the manifest that are not done."""
    failures = {name: read_failures(run.folder / stage.path) for name, stage in run.stages.items() if not stage.done}
    return {name: shards for name, shards in failures.items() if shards}


def retry_shards(run: Run, dag: Dag, settings: Any, failed: Failed, console: Console) -> list[str]:
    """Make these shards. Returns the remaining problems, one line per stage.

    Args:
        dag: wired from the run's configuration.
        settings: that configuration.

    Raises:
        StoreError: the configuration changes the fingerprint of a failed stage, so its shards are not this run's.
        RunBusy: the run is active.
    """
    stages = {stage.name: stage for stage in dag.stages}
    for name in failed:
        if name not in stages or stages[name].fingerprint != run.stages[name].fingerprint:
            raise StoreError(
                f"{run.folder.location}: this configuration changes the output of {name}, whose shards failed; remove "
                "the changes that affect it, or use `quorum run`"
            )
    only = {name: tuple(sorted(shards)) for name, shards in failed.items()}
    how = run_settings(settings, run.folder.location, workflow=run.reference, only=only, lift_quarantine=True)
    groups = [g for g in dag.groups if any(stages[name].group_name == g for name in failed)]
    problems: list[str] = []
    for group in groups:
        outcome = execute(dag, how, executor_of(settings), to_group=group, console=console)
        for name in (name for name in failed if stages[name].group_name == group):
            if name in outcome.not_run:
                problems.append(f"{name}: an input stage is not done; use `quorum run` to make it")
            elif name in outcome.failures and read_failures(stage_folder(run.folder.location, stages[name])):
                problems.append(f"{name}: {outcome.failures[name].reason}")
        if problems:
            break
    return problems

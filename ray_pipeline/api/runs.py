"""Whole runs from Python: the same workflows, configurations and run folders as the `quorum` command's."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from ray_pipeline.config.loading import load_config as read_config
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.results import read_run as read_stored
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.registry import find_workflow


class RunTables:
    """The tables of a stored run, as attributes: `run.verdicts`, `run.decisions.to_pandas()`.

    A table has the rows of all shards of the stages that write it. `dir(run)` and `run.names` list them.
    """

    def __init__(self, stored: Run) -> None:
        self.folder = stored.folder.location
        self.config = stored.config
        self._makers: dict[str, list[tuple[StageResult, str]]] = {}
        for stage in stored.results.values():
            for table in stage.tables:
                name = stage.role if len(stage.tables) == 1 else table
                self._makers.setdefault(name.replace(" ", "_"), []).append((stage, table))

    @property
    def names(self) -> list[str]:
        """Names of the existing tables, in the order of the stages."""
        return list(self._makers)

    def __getattr__(self, name: str) -> pa.Table:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._makers:
            raise AttributeError(f"{self.folder} has no table {name!r}; it has {', '.join(self.names) or 'none'}")
        return pa.concat_tables([stage.table(table).read_all() for stage, table in self._makers[name]])

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.names]

    def __repr__(self) -> str:
        return f"<run {self.folder}: {', '.join(self.names) or 'no table yet'}>"


def read_run(location: str) -> RunTables:
    """A run folder's tables, finished or not. Raises StoreError if the folder has no run."""
    return RunTables(read_stored(location))


def load_config(workflow: str, config: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a configuration, with all checks that are possible before a stage starts.

    Args:
        workflow: name of a workflow, such as `dmapo`, or a Python file that registers one.
        config: YAML file, or the name of a shipped configuration, such as `pocket`.
        overrides: `key=value`, as on the command line.

    Raises:
        ConfigError: unknown workflow or file, unknown or unused key, invalid value, or unknown model.
    """
    kind: type[RunConfig] = find_workflow(workflow).config
    return read_config(kind, config, overrides)


def run(
    workflow: str,
    config: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    from_stage: str | None = None,
    to_stage: str | None = None,
) -> RunTables:
    """Run a workflow; the same call resumes it.

    Args:
        workflow, config, overrides: as for `load_config`.
        run_dir: run folder; default: the run's name below `run.root`.
        from_stage, to_stage: rerun this stage and everything downstream; stop after this one.

    Returns:
        The run's tables.

    Raises:
        ConfigError: as `load_config`.
        CheckFailed: a check before the first stage found a problem; nothing was started.
        RuntimeError: a stage failed; the message names it and the reason. Finished work is kept.
    """
    from ray_pipeline.graph.driver import execute
    from ray_pipeline.operate.check import before_first_stage, engines_elsewhere
    from ray_pipeline.operate.run_settings import executor_of, run_settings

    settings = load_config(workflow, config, overrides)
    folder = settings.run_folder(run_dir)
    graph = find_workflow(workflow).wire(settings, folder)
    how, executor = run_settings(settings, folder, workflow=workflow), executor_of(settings)
    before = before_first_stage(settings, how.session, engines_elsewhere(settings))
    outcome = execute(graph, how, executor, from_group=from_stage, to_group=to_stage, before=before)
    if outcome.failures:
        failed = "; ".join(f"{name}: {failure.reason}" for name, failure in outcome.failures.items())
        raise RuntimeError(f"{failed}. Finished work is kept; the same call resumes the run in {folder}")
    return read_run(folder)

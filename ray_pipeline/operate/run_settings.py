"""Run settings and executor from a workflow's configuration: for `quorum run`, `plan --probe` and `retry`."""

from __future__ import annotations

from typing import Any

from ray_pipeline.graph.driver import RunSettings
from ray_pipeline.graph.executor import Executor
from ray_pipeline.graph.reach import wanted_keys
from ray_pipeline.graph.session import Session
from ray_pipeline.operate.prices import budget_of
from ray_pipeline.workflow.config import RunConfig

EXECUTORS = ("ray", "inprocess")


def run_settings(
    config: RunConfig,
    folder: str,
    *,
    calls_root: str | None = None,
    only: dict[str, tuple[int, ...]] | None = None,
    **other: Any,
) -> RunSettings:
    """The settings of one session of a run.

    Args:
        folder: run folder; absolute path or URI.
        calls_root: folder of the call log; default: the configuration's.
        only: stage → shards to make; default: all.
        other: further fields of RunSettings; they override.
    """
    session = Session(
        folder,
        calls_root or config.calls_root(folder),
        config.num_shards,
        failure=config.failure,
        replay_only=config.calls.replay_only,
        only=only,
    )
    values: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_unset=True),
        "report": config.page().model_dump(mode="json"),
        "budget": budget_of(config, None, None),
        "shared": config.run.shared,
    }
    return RunSettings(session, **(values | other))


def executor_of(config: RunConfig, name: str = "ray", max_stages: int | None = None) -> Executor:
    """The executor of a run.

    Args:
        name: one of `EXECUTORS`.
        max_stages: default: the configuration's.

    Raises:
        ValueError: unknown executor.
    """
    if name not in EXECUTORS:
        raise ValueError(f"unknown executor {name!r}; choose from {', '.join(EXECUTORS)}")
    if name == "inprocess":
        from ray_pipeline.graph.in_process import InProcessExecutor

        return InProcessExecutor()
    from ray_pipeline.graph.ray_executor import RayExecutor

    return RayExecutor(
        config.ray.arguments(),
        max_stages or config.ray.max_stages,
        config.ray.tables.room(),
        wanted_keys(config.served()),
    )

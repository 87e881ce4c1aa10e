"""A scripted run under another gate: the gate and the datasets over the same verdicts, and their audit."""

from __future__ import annotations

import dataclasses
from typing import Any

from dags.dmapo import scored
from ray_pipeline.audit.findings import RunTables
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.golden.scripted_run import OVERRIDES, ScriptedRun
from tests.operate.planted_run import SHARDS, planted_dag

MADE = ("gate-numbers", "gate", "dataset-rows", "datasets")


def gated_again(
    run: ScriptedRun, *overrides: str, made: tuple[str, ...] = MADE
) -> tuple[ScriptedRun, DmapoConfig, list[str]]:
    """The run with the stages `made` anew, its configuration, and what the stages logged."""
    dag, config = planted_dag(run.folder, *OVERRIDES, *overrides)
    stages, lines = {stage.name: stage for stage in dag.stages}, list[str]()
    results = {name: run.results[name] for name in ("prompts", "candidates", "judge", "critic")}
    for name in made:
        make_here([stages[name]], Session(str(run.folder), str(run.calls), SHARDS), results, lines.append)
    return dataclasses.replace(run, stages=stages, results=results), config, lines


def audited(run: ScriptedRun, config: DmapoConfig, **found: Any) -> dict[str, int]:
    """Kinds of problems and their numbers.

    Args:
        found: what the gate's stage stored about all candidates, by the names of `RunTables`.
    """
    results = run.results
    (made,) = scored(config)
    assert made.gate is not None
    tables = RunTables(
        prompts=results["prompts"].table(),
        candidates=results["candidates"].table(),
        verdicts=[results["judge"].table()],
        critiques=results["critic"].table(),
        decisions=results["gate"].table(),
        datasets=results["datasets"].folder,
        judges=list(made.judges),
        gate=made.gate,
        config=made.config,
        **found,
    )
    return audit_run(tables).found

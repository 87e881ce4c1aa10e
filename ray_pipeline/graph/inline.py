"""Make stages without an engine in this process, shard after shard: no cluster, and the same files and results."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ray_pipeline.graph.run import load_result, stage_folder
from ray_pipeline.graph.shard_map import Receipt, ShardJob, make_shard
from ray_pipeline.graph.stage import ShardWork, Stage, StageResult, StageStop, WholeInput, stage_table
from ray_pipeline.graph.totals import receipts_of, rows_of_tables, tables_by_role
from ray_pipeline.store.files import Folder


def make_here(
    stages: Sequence[Stage],
    run: str,
    num_shards: int,
    results: dict[str, StageResult],
    calls_root: str,
    log: Callable[[str], None],
) -> None:
    """Make the given stages, in an order in which each comes after those that it reads; finished ones are kept.

    Args:
        results: by stage name, what there is; what is made is added.

    Raises:
        StageStop: a shard failed; the others are kept.
        ValueError: a stage has an engine.
    """
    for stage in stages:
        found = load_result(run, stage, num_shards, log)
        results[stage.name] = found or _make(stage, run, num_shards, results, calls_root, log)


def _make(
    stage: Stage,
    run: str,
    num_shards: int,
    results: dict[str, StageResult],
    calls_root: str,
    log: Callable[[str], None],
) -> StageResult:
    begin = time.monotonic()
    folder = stage_folder(run, stage)
    parents = {role: results[parent.name] for role, parent in stage.inputs.items()}
    facts: dict[str, Any]
    usage: dict[str, float] = {}
    if isinstance(stage.work, ShardWork):
        facts, usage = _shards(stage, stage.work, folder, num_shards, parents, calls_root)
    else:
        given = WholeInput(
            parents,
            folder,
            Folder(calls_root),
            stage.fingerprint,
            num_shards,
            stage.work.settings,
            lambda line: log(f"{stage.name}: {line}"),
            lambda done, total: None,
        )
        facts = stage.work.function(given)
    tables = stage.work.tables
    outputs = {k: stage_table(folder.location, tables, k, num_shards, stage.fingerprint) for k in tables}
    rows = rows_of_tables(stage.name, outputs)
    usage = {**usage, "wall_seconds": time.monotonic() - begin}
    return StageResult(
        stage.name,
        stage.fingerprint,
        folder.location,
        num_shards,
        tables,
        rows,
        facts,
        usage,
        role=stage.role_name,
    ).save()


def _shards(
    stage: Stage,
    work: ShardWork,
    folder: Folder,
    num_shards: int,
    parents: dict[str, StageResult],
    calls_root: str,
) -> tuple[dict[str, Any], dict[str, float]]:
    if work.engine is not None:
        raise ValueError(f"{stage.name} asks a model; only `quorum run` can make it")
    job = ShardJob(
        stage=stage.name,
        folder=folder.location,
        fingerprint=stage.fingerprint,
        num_shards=num_shards,
        work=work,
        inputs=tables_by_role(parents),
        facts={role: parent.facts for role, parent in parents.items()},
        calls_root=calls_root,
        session=uuid.uuid4().hex[:8],
        replay_only=False,
        board=None,
    )
    missing = sorted({s for kind in work.tables for s in job.output(kind).state().missing})
    for shard in missing:
        receipt = Receipt(**json.loads(make_shard({"shard": [shard]}, job)["receipt"][0]))
        if receipt.status == "stopped":
            raise StageStop(receipt.error)
        if receipt.status != "ok":
            raise StageStop(f"{stage.name}: shard {shard} failed: {receipt.error}")
    return receipts_of(folder, num_shards)

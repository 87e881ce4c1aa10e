"""A run folder as `quorum run dmapo` leaves it, written by the real stages on planted scores, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dags.dmapo import dmapo
from ray_pipeline.config.loading import read_config
from ray_pipeline.data.gate import GateConfig, decide, label_counts
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.receipts import receipt_name
from ray_pipeline.graph.results import read_run
from ray_pipeline.graph.stage import Dag, Stage, StageRef
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.planted import JUDGES, World, by_shard, random_world

SHARDS = 4


def planted_dag(folder: Path, *overrides: str) -> tuple[Dag, Any]:
    """The DAG of one judge whose fingerprints the planted files carry, and its configuration."""
    with open("tests/one_judge.yaml", encoding="utf-8") as file:
        values = yaml.safe_load(file)
    config = read_config(DmapoConfig, values, [f"prompts.num_shards={SHARDS}", *overrides])
    return dmapo(config, str(folder)), config


def plant(folder: Path, world: World | None = None, *overrides: str) -> Path:
    """Prompts to gate done, what follows waiting."""
    world = world or random_world(40, seed=1)
    dag, config = planted_dag(folder, *overrides)
    stages = {stage.name: stage for stage in dag.stages}
    parts = {
        name: by_shard(getattr(world, name), SHARDS) for name in ("prompts", "candidates", "verdicts", "critiques")
    }
    decisions = [
        decide(parts["candidates"][s], parts["verdicts"][s], parts["critiques"][s], JUDGES, GateConfig())
        for s in range(SHARDS)
    ]
    tables = {
        "prompts": parts["prompts"],
        "candidates": parts["candidates"],
        "judge": parts["verdicts"],
        "critic": parts["critiques"],
        "gate": decisions,
    }
    done = {name: _write(folder, stages[name], made) for name, made in tables.items()}
    done["gate"]["facts"] = {"counts": label_counts(_all(decisions))}
    done["judge"]["facts"] = {"counts": {"helpfulness.ok": 150, "helpfulness.unparsed": 3, "factuality.unparsed": 1}}
    manifest = {
        "dag": "dmapo",
        "config_digest": "0" * 32,
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_unset=True),
        "report": config.page().model_dump(mode="json"),
        "num_shards": SHARDS,
        "calls_root": f"{folder}/calls",
        "stages": {stage.name: {**stage_entry(stage), **done.get(stage.name, {})} for stage in dag.stages},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    read_run(str(folder))
    return folder


def _write(folder: Path, stage: Stage, made: list[Any]) -> dict[str, Any]:
    place = folder / stage.folder_name
    (kind,) = stage.work.tables
    table = StageRef.of(stage, str(folder), SHARDS).table(kind)
    for shard, part in enumerate(made):
        table.write(shard, part)
        receipt = {"shard": shard, "status": "ok", "rows": {kind: part.num_rows}, "counts": {}, "usage": {}}
        (place / "_receipts").mkdir(exist_ok=True)
        (place / "_receipts" / receipt_name(shard)).write_text(json.dumps({**receipt, "error": None}))
    usage = {"wall_seconds": 2.0, "calls_engine": 160.0, "calls_log": 0.0, "prompt_tokens": 1000.0,
             "completion_tokens": 200.0, "cached_tokens": 250.0}  # fmt: skip
    facts: dict[str, Any] = {"counts": {}}
    rows = {kind: sum(part.num_rows for part in made)}
    result = {"stage": stage.name, "fingerprint": stage.fingerprint, "rows": rows, "facts": facts, "usage": usage}
    (place / "_result.json").write_text(json.dumps(result))
    return {"status": "done", "rows": rows, "facts": facts, "usage": usage}


def _all(tables: list[Any]) -> Any:
    import pyarrow as pa

    return pa.concat_tables(tables)

"""A run of two rounds up to its second datasets by the real stages on scripted replies, without a training."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import Run, read_run
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, ShardWork, Stage, StageRef, StageResult
from ray_pipeline.workflow.rounds import RoundsConfig
from tests.golden.scripted_run import ask
from tests.scripted import Script


def play_rounds(folder: Path, given: RoundsConfig, made: Dag, replies: Script | None = None) -> Run:
    """The stages in the order of the DAG, as if a policy had been trained in between."""
    shards, results = given.num_shards, dict[str, StageResult]()
    session = Session(str(folder), str(folder / "calls"), shards)
    train = next(stage for stage in made.stages if stage.name == "train")
    trained = StageResult(**vars(StageRef.of(train, str(folder), shards)), rows={}, facts={})
    for stage in made.stages:
        if stage.group_name.startswith(("train", "evaluate")):
            continue
        if isinstance(stage.work, ShardWork) and stage.work.engine is not None:
            reads = {**results, "train": trained}
            results[stage.name] = asyncio.run(ask(stage, stage.work, session, reads, replies))
        else:
            make_here([stage], session, results, lambda line: None)
    done = {name: {"status": "done", **result.plain()} for name, result in results.items()}
    manifest = {
        "dag": made.name,
        "config": given.model_dump(mode="json"),
        "given": given.model_dump(mode="json", exclude_unset=True),
        "report": given.page().model_dump(mode="json"),
        "num_shards": shards,
        "stages": {stage.name: {**stage_entry(stage), **done.get(stage.name, {})} for stage in made.stages},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_run(str(folder))


def known(made: Dag) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in made.stages}


def of(made: Dag, name: str) -> Stage:
    return next(stage for stage in made.stages if stage.name == name)

"""What an engine wants the user to know reaches the run's log, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray_pipeline.engines.models import Placement
from ray_pipeline.graph.shard_map import ShardActor
from tests.scripted import ScriptedEngine


def test_notes_are_told_once() -> None:
    told: list[str] = []
    engine: Any = ScriptedEngine()
    board = SimpleNamespace(say=SimpleNamespace(remote=told.append))
    work = SimpleNamespace(engine=lambda: engine, placement=Placement())
    job: Any = SimpleNamespace(work=work, board=board, stage="judge")
    actor = ShardActor([job])
    actor._tell(job)  # most engines have none
    engine.notes = ["no schemas here"]
    actor._tell(job)
    actor._tell(job)
    engine.notes.append("and no seeds")
    actor._tell(job)
    assert told == ["judge: no schemas here", "judge: and no seeds"]

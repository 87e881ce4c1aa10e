"""What an engine wants the user to know reaches the run's log, once."""

from __future__ import annotations

from typing import Any

from ray_pipeline.graph.session import Session, StageTask
from ray_pipeline.graph.shards import EngineHost
from ray_pipeline.graph.stage import ShardOutput, ShardWork, StageRef
from tests.scripted import ScriptedEngine


def test_notes_are_told_once() -> None:
    engine: Any = ScriptedEngine()
    work = ShardWork(lambda given: ShardOutput({}), (), engine=lambda: engine)
    task = StageTask(StageRef("judge", "f", "/run/judge-f", 1, ()), work, {}, Session("/run", "/run/calls", 1))
    host = EngineHost([task])
    host._report_notes(task)  # most engines have none
    engine.notes = ["no schemas here"]
    host._report_notes(task)
    host._report_notes(task)
    engine.notes.append("and no seeds")
    host._report_notes(task)
    told = [note.text for note in task.session.board.look()[1]]
    assert told == ["judge: no schemas here", "judge: and no seeds"]

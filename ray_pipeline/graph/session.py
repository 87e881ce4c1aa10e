"""What a run hands to whoever works for it: the session, and its tasks with what each depends on."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.stage import ShardWork, Stage, StageRef, StageResult, WholeWork


@dataclasses.dataclass(frozen=True)
class Session:
    """What holds for a whole run of the driver.

    Attributes:
        folder: run folder; absolute path or URI.
        calls_root: folder of the call log.
        failure: what happens to shards and stages that fail.
        replay_only: answer every LLM call from the log, and fail where it cannot.
        only: by stage, the shards to make, and none of other sharded stages; None: all that are missing.
        again: names of the stages to make again, even if they are done.
        working_folder: the driver's, which relative paths of the configuration start from.
        id: unique to this session.
        board: collects progress; the executor's own while a run is under way.
    """

    folder: str
    calls_root: str
    num_shards: int
    failure: FailureSettings = dataclasses.field(default_factory=FailureSettings)
    replay_only: bool = False
    only: Mapping[str, tuple[int, ...]] | None = None
    again: frozenset[str] = frozenset()
    working_folder: str = dataclasses.field(default_factory=os.getcwd)
    id: str = "session"
    board: ProgressBoard = dataclasses.field(default_factory=ProgressBoard)

    def ref(self, stage: Stage) -> StageRef:
        """Where a stage's output is, or will be."""
        return StageRef.of(stage, self.folder, self.num_shards)

    def task(self, stage: Stage) -> StageTask:
        inputs = {role: self.ref(parent) for role, parent in stage.inputs.items()}
        return StageTask(self.ref(stage), stage.work, inputs, self, stage.settings_key)

    def may_make(self, stage: str, shard: int) -> bool:
        return self.only is None or shard in self.only.get(stage, ())


@dataclasses.dataclass(frozen=True)
class StageTask:
    """A stage to be made: what identifies its output, the work, what it reads, and the session.

    Attributes:
        inputs: by role, the stages that it reads. They are `StageResult`s once those are done.
        settings_key: see `Stage.settings_key`.
    """

    ref: StageRef
    work: ShardWork | WholeWork
    inputs: Mapping[str, StageRef]
    session: Session
    settings_key: str = ""

    @property
    def name(self) -> str:
        return self.ref.name

    def reading(self, results: Mapping[str, StageResult]) -> StageTask:
        """The same task with the results of the stages that it reads, by name."""
        inputs = {role: results[parent.name] for role, parent in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs)

    @property
    def facts(self) -> dict[str, Mapping[str, Any]]:
        """By role, what the stages that it reads found out."""
        return {role: parent.facts for role, parent in self.inputs.items() if isinstance(parent, StageResult)}


class ShardTask(NamedTuple):
    """One shard of a stage, or a stage that works on whole tables (`shard` None).

    Attributes:
        after: (stage, shard) of the tasks whose output it reads; what is done already is left out.
    """

    stage: str
    shard: int | None
    after: tuple[tuple[str, int | None], ...]


@dataclasses.dataclass(frozen=True)
class TaskGraph:
    """Everything that a run has to make.

    Attributes:
        stages: each after those that it reads.
    """

    stages: tuple[StageTask, ...]

    @functools.cached_property
    def shards(self) -> tuple[ShardTask, ...]:
        """What is missing, shard by shard: shard i of a stage reads shard i of its inputs, and all of an input that is
        made as a whole; a stage that works on whole tables reads every shard of its inputs."""
        missing: dict[str, Sequence[int | None]] = {}
        found: list[ShardTask] = []
        for task in self.stages:
            missing[task.name] = task.ref.missing() if isinstance(task.work, ShardWork) else (None,)
            for shard in missing[task.name]:
                after = tuple(
                    (parent.name, other)
                    for parent in task.inputs.values()
                    for other in missing.get(parent.name, ())
                    if shard is None or other is None or other == shard
                )
                found.append(ShardTask(task.name, shard, after))
        return tuple(found)

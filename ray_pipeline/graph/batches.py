"""How many shards an actor gets at once, so that its calls in flight do not depend on how prompts were cut.

An actor works on `placement.shards_in_flight` batches. A batch is a shard, or as many small ones as can be open at once
(`admission`): the next batch then waits in the actor while the last calls of one are answered.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence

from ray_pipeline.graph.admission import OPEN_ROWS
from ray_pipeline.graph.asking import Asking, ShardTables, Skip
from ray_pipeline.graph.session import StageTask
from ray_pipeline.graph.shards import CONCURRENCY, read_inputs, sharded
from ray_pipeline.graph.stage import ShardWork, StageStop

logger = logging.getLogger("quorum.shards")

Batch = tuple[str, tuple[int, ...]]
"""A stage, and shards of it that one actor makes at the same time."""

#: Shards whose rows are counted. Prompts are cut into shards by hash, so all shards of a stage have about as many.
_SAMPLE = 4


def in_batches(tasks: Sequence[StageTask], todo: Sequence[tuple[str, int]], actors: int) -> list[Batch]:
    """The shards to make as batches, in the same order.

    No batch is so large that an actor would have nothing to do while another one has more than a batch.

    Args:
        tasks: stages whose calls go to one engine.
        todo: stage and shard, stage after stage.
        actors: that can be at work.

    Raises:
        StageStop: an input is damaged or missing.
    """
    by_name = {task.name: task for task in tasks}
    batches: list[Batch] = []
    for stage, group in itertools.groupby(todo, key=lambda item: item[0]):
        shards = [shard for _, shard in group]
        size = _shards_of_a_batch(by_name[stage], shards, actors)
        batches += [(stage, part) for part in _even(shards, size)]
    return batches


def _shards_of_a_batch(task: StageTask, shards: Sequence[int], actors: int) -> int:
    work = sharded(task)
    most = math.ceil(len(shards) / (actors * work.placement.shards_in_flight))
    if most == 1 or (rows := _rows_of_a_shard(task, shards)) is None:
        return 1
    return max(1, min(most, int(OPEN_ROWS * _calls_in_flight(work) / rows) if rows else most))


def _calls_in_flight(work: ShardWork) -> int:
    """As `EngineHost` has them; the constructor of an engine loads nothing."""
    if work.placement.concurrency is not None:
        return work.placement.concurrency
    return int(getattr(work.engine and work.engine(), "useful_concurrency", CONCURRENCY))


def _rows_of_a_shard(task: StageTask, shards: Sequence[int]) -> float | None:
    """Mean number of items to ask about, from some shards; None where that cannot be known."""
    work = sharded(task)
    if not isinstance(work.function, Asking):
        return None
    sample = shards[:: math.ceil(len(shards) / _SAMPLE)]
    rows = 0
    for shard in sample:
        tables = ShardTables(read_inputs(task, shard), task.facts)
        try:
            rows += sum(not isinstance(item, Skip) for item in work.function.items(tables, work.settings))
        except StageStop:
            raise
        except Exception as error:  # the shard will fail with it, be retried, and be reported
            logger.debug("%s: rows of shard %d: %s", task.name, shard, error)
            return None
    return rows / len(sample)


def _even(shards: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Parts of about equal length, of at most `size`."""
    parts = math.ceil(len(shards) / size)
    for part in range(parts):
        yield tuple(shards[part * len(shards) // parts : (part + 1) * len(shards) // parts])

"""The executor of one process: real engines, no cluster; breakpoints work in every stage."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.engines import core_server
from ray_pipeline.engines.base import EngineDead
from ray_pipeline.graph.batches import Batch, in_batches
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.receipts import Receipt
from ray_pipeline.graph.resume import load_result
from ray_pipeline.graph.session import Session, StageTask, TaskGraph
from ray_pipeline.graph.shards import EngineHost, make_columnar, sharded
from ray_pipeline.graph.stage import Stage, StageResult, StageStop
from ray_pipeline.graph.stage_work import End, Failure, run_stages


class InProcessExecutor:
    """Makes pool after pool in the calling thread. A pool's engine is made once and closed after its last stage."""

    live = False

    @contextlib.contextmanager
    def open(self, session: Session, say: Callable[[str], None]) -> Iterator[ProgressBoard]:
        with core_server.kept():  # from pool to pool
            yield ProgressBoard()

    def run(self, graph: TaskGraph, done: Mapping[str, StageResult]) -> Iterator[tuple[str, End]]:
        ends: dict[str, End] = dict(done)
        for tasks in share_pools(graph.stages):
            parents = {parent.name: ends[parent.name] for task in tasks for parent in task.inputs.values()}
            made = run_stages(tasks, parents, _map_shards)
            for task, end in zip(tasks, made, strict=True):
                ends[task.name] = end
                yield task.name, end


def make_here(
    stages: Sequence[Stage], session: Session, results: dict[str, StageResult], say: Callable[[str], None]
) -> None:
    """Make the given stages, each after those that it reads; finished ones are kept.

    Args:
        results: by name, the stages that are done; those that are made are added.
        say: takes a line for each unusable shard file, and each that a stage logs.

    Raises:
        StageStop: a stage failed; what is done is kept.
    """
    found = {stage.name: load_result(session.ref(stage), say) for stage in stages}
    results.update({name: result for name, result in found.items() if result is not None})
    todo = tuple(session.task(stage) for stage in stages if found[stage.name] is None)
    for name, end in InProcessExecutor().run(TaskGraph(todo), results):
        for note in session.board.look()[1]:
            say(note.text)
        if isinstance(end, Failure):
            raise StageStop(end.reason)
        results[name] = end


def _map_shards(tasks: Sequence[StageTask], todo: Sequence[tuple[str, int]], take: Callable[[Receipt], None]) -> None:
    if sharded(tasks[0]).engine is None:
        (task,) = tasks
        for _, shard in todo:
            take(make_columnar(task, shard))
    else:
        asyncio.run(_map_on_engine(tasks, todo, take))


async def _map_on_engine(
    tasks: Sequence[StageTask], todo: Sequence[tuple[str, int]], take: Callable[[Receipt], None]
) -> None:
    """Make shards on one engine, several at once. An engine that dies is replaced, and its shards go to the new one."""
    waiting = collections.deque(in_batches(tasks, todo, actors=1))
    while waiting:
        host, lost = EngineHost(tasks), list[Batch]()

        async def make(stage: str, shard: int, host: EngineHost = host, lost: list[Batch] = lost) -> None:
            try:
                take(await host.make(stage, shard))
            except EngineDead:
                lost.append((stage, (shard,)))

        async def work(host: EngineHost = host, make: Callable[[str, int], Coroutine[Any, Any, None]] = make) -> None:
            while waiting and not host.dead:
                stage, shards = waiting.popleft()
                await all_of(make(stage, shard) for shard in shards)

        try:
            await all_of(work() for _ in range(sharded(tasks[0]).placement.shards_in_flight))
        finally:
            await host.close()
        waiting.extendleft(reversed(lost))

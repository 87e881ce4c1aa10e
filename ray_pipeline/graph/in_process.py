"""The executor of one process: real engines, no cluster; breakpoints work in every stage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from ray_pipeline.engines import core_server
from ray_pipeline.engines.base import EngineDead
from ray_pipeline.engines.warm import warm_python
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.receipts import Receipt
from ray_pipeline.graph.resume import load_result
from ray_pipeline.graph.session import Session, StageTask, TaskGraph
from ray_pipeline.graph.shards import EngineHost, make_columnar, sharded
from ray_pipeline.graph.stage import Stage, StageResult, StageStop, WholeWork
from ray_pipeline.graph.stage_work import End, Failure, run_stages


class InProcessExecutor:
    """Makes pool after pool in the calling thread. A pool's engine is made once and closed after its last stage."""

    live = False

    @contextlib.contextmanager
    def open(self, session: Session, todo: Sequence[Stage], say: Callable[[str], None]) -> Iterator[ProgressBoard]:
        trains = any(isinstance(stage.work, WholeWork) and stage.work.trains for stage in todo)
        with warm_python(wanted=trains), core_server.kept():  # from pool to pool
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
    """Make shards on one engine, as many at once as it admits. The shards of one that dies go to another."""
    waiting = list(todo)
    while waiting:
        host, lost = EngineHost(tasks), set[tuple[str, int]]()

        async def make(stage: str, shard: int, host: EngineHost = host, lost: set[tuple[str, int]] = lost) -> None:
            try:
                take(await host.make(stage, shard))
            except EngineDead:
                lost.add((stage, shard))

        try:
            await all_of(make(stage, shard) for stage, shard in waiting)
        finally:
            await host.close()
        waiting = [one for one in waiting if one in lost]

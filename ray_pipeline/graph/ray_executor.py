"""The executor on Ray: a task for every pool of stages, wired by their results, and a board in an actor of its own.

Ray is imported when there is a stage to make: a finished run needs none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ray_pipeline.engines.sharing import spec_of
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.reach import WantedKey, check_nodes
from ray_pipeline.graph.session import Session, StageTask, TaskGraph
from ray_pipeline.graph.stage import ShardWork, Stage, StageResult, WholeWork
from ray_pipeline.graph.stage_work import End, explain, run_stages
from ray_pipeline.store.locations import base_name

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: Seconds between two moments at which the driver may be interrupted while it waits for stages.
_WAIT_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class RayExecutor:
    """Runs stages on a Ray cluster. A stage begins when all of its inputs are done.

    Attributes:
        arguments: of `ray.init`.
        max_stages: how many pools may be at work at once; None: all whose inputs are there.
        room: Ray's arguments for tasks that make shards without an engine: labels and custom resources.
        keys: environment variables that nodes with engines must have.
    """

    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_stages: int | None = None
    room: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[WantedKey, ...] = ()
    live = True

    @contextlib.contextmanager
    def open(self, session: Session, todo: Sequence[Stage], say: Callable[[str], None]) -> Iterator[ProgressBoard]:
        import ray

        from ray_pipeline.graph.cluster import connected

        with connected(self.arguments, say, warm=any(_imports_much(stage.work) for stage in todo)):
            nodes = check_nodes([session.folder, session.calls_root], self.keys)
            if nodes:
                say(f"{nodes} nodes read and write in {session.folder}")
            board_class: Any = ray.remote(num_cpus=0)(ProgressBoard)
            board: Any = board_class.options(scheduling_strategy=_here()).remote()
            board.meter.remote(base_name(session.folder))
            yield cast(ProgressBoard, _RayBoard(board))

    def run(self, graph: TaskGraph, done: Mapping[str, StageResult]) -> Iterator[tuple[str, End]]:
        import ray

        task: Any = ray.remote(num_cpus=0, max_retries=2, retry_exceptions=False)(_run_stages)
        here = _here()
        outputs: dict[str, Any] = dict(done)
        ends: dict[str, End] = dict(done)
        running: dict[Any, dict[str, Any]] = {}  # by the first of a pool's references: stage → its own

        def submit(tasks: Sequence[StageTask]) -> None:
            names = list(dict.fromkeys(parent.name for task in tasks for parent in task.inputs.values()))
            options = {"name": "+".join(t.name for t in tasks), "scheduling_strategy": here, "num_returns": len(tasks)}
            inputs = [ends.get(name, outputs[name]) for name in names]  # how one ended, even where its task was lost
            found = task.options(**options).remote(tasks, self.room, names, *inputs)
            refs = dict(zip([t.name for t in tasks], found if len(tasks) > 1 else [found], strict=True))
            outputs.update(refs)
            running[next(iter(refs.values()))] = refs

        later = share_pools(graph.stages)
        while later or running:
            for tasks in _may_start(later, ends, len(running), self.max_stages):
                later.remove(tasks)
                submit(tasks)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_WAIT_SECONDS)
            for first in ready:
                for name, ref in running.pop(first).items():
                    ends[name] = _end(name, ref)
                    yield name, ends[name]


def _imports_much(work: ShardWork | WholeWork) -> bool:
    """Whether workers of their own import torch or vLLM for it."""
    if isinstance(work, WholeWork):
        return work.trains
    return work.engine is not None and spec_of(work.engine) is not None


def _here() -> NodeAffinitySchedulingStrategy:
    """Beside the driver, where everything lives that steers a stage: the loss of another node then costs actors and
    their shards, not the stage. The driver's own node cannot be lost without the run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)


def _run_stages(tasks: Sequence[StageTask], room: Mapping[str, Any], names: Sequence[str], *parents: End) -> Any:
    """The Ray task of a pool: its one stage's end, or a list of ends.

    Args:
        names: of the stages that they read.
        parents: the ends of those; Ray resolves what is not inside a list.
    """
    from ray_pipeline.graph.ray_shards import map_shards

    ends = run_stages(tasks, dict(zip(names, parents, strict=True)), functools.partial(map_shards, room=room))
    return ends if len(ends) > 1 else ends[0]


def _end(name: str, ref: Any) -> End:
    import ray

    try:
        end: End = ray.get(ref)
        return end
    except Exception as error:  # of the task itself: what goes wrong in a stage is a value
        return explain(name, error)


def _may_start(
    later: list[tuple[StageTask, ...]], ends: Mapping[str, End], at_work: int, max_stages: int | None
) -> list[tuple[StageTask, ...]]:
    """Pools to submit now, of those that were not. Without a limit all of them: Ray starts each when its inputs are
    there. With one, only those that can begin at once, so that none holds a place while it waits."""
    if max_stages is None:
        return list(later)
    ready = [g for g in later if all(parent.name in ends for task in g for parent in task.inputs.values())]
    return ready[: max(0, max_stages - at_work)]


class _RayBoard:
    """A `ProgressBoard` in an actor, with its methods. Only those that have an answer wait for it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __reduce__(self) -> tuple[type[_RayBoard], tuple[Any]]:
        return _RayBoard, (self._actor,)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)
        seconds = {"stopping": 60, "look": 10}.get(name)
        if seconds is None:
            return lambda *args, **kwargs: method.remote(*args, **kwargs)
        import ray

        return lambda *args: ray.get(method.remote(*args), timeout=seconds)

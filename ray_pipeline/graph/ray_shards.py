"""Ray Data maps the missing shards of stages over actors (with an engine) or tasks (without).

A row of the Ray Dataset is a stage and shard numbers; receipts come back. Text never travels through Ray, and no
error either: of an error in a worker Ray hands on a page of stack frames, so a receipt holds the reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ray_pipeline.engines.base import EngineDead
from ray_pipeline.engines.models import Placement
from ray_pipeline.graph.batches import Batch, in_batches
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.receipts import Receipt
from ray_pipeline.graph.session import StageTask
from ray_pipeline.graph.shards import EngineHost, make_columnar, sharded
from ray_pipeline.graph.stage import ShardWork, StageStop

#: Shares of the shards that a pool can have in flight: from the first on it grows, at the second it may shrink.
GROW_AT, SHRINK_AT = 0.25, 0.1


def map_shards(
    tasks: Sequence[StageTask],
    shards: Sequence[tuple[str, int]],
    take: Callable[[Receipt], None],
    room: Mapping[str, Any] | None = None,
) -> None:
    """Make the given shards (stage and number), in about their order; `take` gets a receipt as each is done.

    Args:
        tasks: of one stage, or of several whose calls can go to one engine: they share the actors.
        room: labels and custom resources for tasks without an engine; an engine's are in its placement.

    Raises:
        StageStop: the actors would hold every CPU.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data gives back actors beyond the GPUs that are there now, and asks for them again when the pool is busy
    # enough. Its own measure of busy (1.75 times what the actors can do at once) is never reached by a pool that is
    # given no more than that.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
    context.autoscaling_config.actor_pool_util_downscaling_threshold = SHRINK_AT
    work = sharded(tasks[0])
    if work.engine is not None:
        check_room(tasks[0].name, work)
        place = _engine_room(work, work.placement)
        batches = in_batches(tasks, shards, _actors(work.placement.max_actors, place))
        dataset = _dataset(batches).map_batches(
            ShardActor,
            batch_size=1,
            fn_constructor_args=(tuple(tasks),),
            compute=_pool(work.placement, len(batches)),
            **place,
        )
    else:
        (task,) = tasks
        dataset = _dataset([(stage, (shard,)) for stage, shard in shards]).map_batches(
            _make_columnar,  # type: ignore[arg-type]
            batch_size=1,
            fn_args=(task,),
            compute=TaskPoolStrategy(),
            num_cpus=1,
            **(room or {}),
        )
    for row in dataset.iter_rows():
        take(Receipt(**json.loads(row["receipt"])))


def _dataset(batches: Sequence[Batch]) -> ray.data.Dataset:
    rows = [{"stage": stage, "shards": list(shards)} for stage, shards in batches]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


class ShardActor:
    """The actor around an `EngineHost`.

    Args:
        tasks: see `EngineHost`.
    """

    def __init__(self, tasks: Sequence[StageTask]) -> None:
        _free_threads()
        self._host = EngineHost(tasks, _devices())
        first = tasks[0]
        if sharded(first).placement.max_actors > 1:
            first.session.board.actor(first.name, ray.util.get_node_ip_address())

    async def __call__(self, batch: Mapping[str, Any]) -> Any:
        try:
            stage = str(batch["stage"][0])
            receipts = await all_of(self._host.make(stage, int(shard)) for shard in batch["shards"][0])
        except EngineDead:
            os._exit(1)  # Ray Data replaces the actor and gives its shards to the new one
        yield _rows(receipts)


def _make_columnar(batch: dict[str, Any], task: StageTask) -> dict[str, Any]:
    return _rows([make_columnar(task, int(shard)) for shard in batch["shards"][0]])


def _rows(receipts: Sequence[Receipt]) -> dict[str, Any]:
    return {"receipt": [json.dumps(dataclasses.asdict(receipt)) for receipt in receipts]}


def _devices() -> float:
    """GPUs that this actor holds; an engine without any counts as one device."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0)) or 1.0


def _free_threads() -> None:
    """Leave the number of an engine's threads to the engine, where Ray has set one thread only because the actor
    reserves no CPU."""
    if not ray.get_runtime_context().get_assigned_resources().get("CPU") and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]


def _engine_room(work: ShardWork, placement: Placement) -> dict[str, Any]:
    """Ray's resource arguments of an actor with an engine."""
    num_gpus = placement.num_gpus
    if num_gpus is None:
        factory_spec = getattr(work.engine, "args", ())
        # The specification of an engine that is elsewhere (an endpoint) has no such field.
        wanted = getattr(factory_spec[0], "tensor_parallel_size", 0) if factory_spec else 1
        num_gpus = wanted if ray.cluster_resources().get("GPU", 0) else 0
    return {"num_cpus": placement.num_cpus, "num_gpus": num_gpus, **placement.room()}


def _actors(most: int, room: Mapping[str, Any]) -> int:
    """Actors that the cluster has room for now, at least one: a node that joins later takes batches that wait."""
    there = ray.cluster_resources()
    each = {"GPU": room["num_gpus"], "CPU": room["num_cpus"], **room.get("resources", {})}
    return max(1, min([most, *(int(there.get(name, 0) / amount) for name, amount in each.items() if amount)]))


def _pool(placement: Placement, batches: int) -> ActorPoolStrategy:
    """All actors that are allowed are requested at once: what has no place yet waits for a node that joins, and shows
    the autoscaler that one is wanted."""
    actors = min(placement.max_actors, batches)
    return ActorPoolStrategy(
        min_size=min(placement.min_actors, actors),
        max_size=actors,
        initial_size=actors,
        max_tasks_in_flight_per_actor=placement.shards_in_flight,
        max_concurrent_calls_per_actor=placement.shards_in_flight,
    )


def check_room(stage: str, work: ShardWork) -> None:
    """Refuse a pool that would hold every CPU: Ray Data then waits for ever.

    Raises:
        StageStop: naming the stage and the numbers.
    """
    placement = work.placement
    cpus = ray.cluster_resources().get("CPU", 0)
    wanted = placement.max_actors * placement.num_cpus
    if wanted and wanted > cpus - 1:
        raise StageStop(
            f"{stage}: {placement.max_actors} actors × {placement.num_cpus:g} CPUs leave none of the cluster's "
            f"{cpus:g} CPUs for Ray Data, which would hang. Lower placement.max_actors or placement.num_cpus "
            "(0 is fine for engines)"
        )

"""Which stages share a pool of engines, so that their model is loaded once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ray_pipeline.graph.stage import ShardWork, Stage


def share_pools(todo: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Stages in groups, each in order and the groups in the order of their first stages; most are alone.

    Stages share a pool when they ask the same model, in the same place, and wait for the same unfinished stages: none
    is kept from beginning by another's inputs. Their shards are made one stage after another.

    Args:
        todo: the stages that are not done, each after those that it reads.
    """
    waits: dict[str, frozenset[str]] = {}
    groups: list[list[Stage]] = []
    for stage in todo:
        parents = {parent.name for parent in stage.inputs.values()} & waits.keys()
        waits[stage.name] = frozenset(parents).union(*(waits[name] for name in parents))
        group = next((g for g in groups if waits[g[0].name] == waits[stage.name] and _same_pool(g[0], stage)), None)
        if group is None:
            groups.append([stage])
        else:
            group.append(stage)
    return [tuple(group) for group in groups]


def _same_pool(one: Stage, other: Stage) -> bool:
    first, second = one.work, other.work
    return (
        isinstance(first, ShardWork)
        and isinstance(second, ShardWork)
        and first.engine is not None
        and _parts(first.engine) == _parts(second.engine)
        and first.placement == second.placement
    )


def _parts(factory: Any) -> tuple[Any, ...]:
    """What makes an engine, comparable: two partials of the same parts are not equal."""
    if isinstance(factory, functools.partial):
        return (factory.func, factory.args, factory.keywords)
    return (factory,)

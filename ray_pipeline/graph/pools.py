"""Which stages share a pool of engines, so that their model is loaded once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ray_pipeline.graph.stage import ShardWork, WholeWork


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Step(_Named, Protocol):
    """What a stage and its task have in common."""

    @property
    def work(self) -> ShardWork | WholeWork: ...

    @property
    def inputs(self) -> Mapping[str, _Named]: ...


S = TypeVar("S", bound=_Step)


def share_pools(todo: Sequence[S]) -> list[tuple[S, ...]]:
    """Stages in groups, each in order and the groups in the order of their first stages; most are alone.

    Stages share a pool when they use the same model, in the same place, and wait for the same unfinished stages: none
    is kept from beginning by another's inputs. Their shards are made one stage after another.

    Args:
        todo: the stages that are not done, each after those that it reads.
    """
    waits: dict[str, frozenset[str]] = {}
    groups: list[list[S]] = []
    for stage in todo:
        parents = {parent.name for parent in stage.inputs.values()} & waits.keys()
        waits[stage.name] = frozenset(parents).union(*(waits[name] for name in parents))
        group = next((g for g in groups if waits[g[0].name] == waits[stage.name] and _same_pool(g[0], stage)), None)
        if group is None:
            groups.append([stage])
        else:
            group.append(stage)
    return [tuple(group) for group in groups]


def _same_pool(one: _Step, other: _Step) -> bool:
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

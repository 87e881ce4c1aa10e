"""Which stages share a pool of engines, so that their model is loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from ray_pipeline.engines.sharing import adapter_of, can_share
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
    """Stages in groups, each in order, and each group after those that it reads; most are alone.

    Stages share a pool when they use the same model, in the same place, and wait for the same unfinished stages: none
    is kept from beginning by another's inputs. Stages with LoRA adapters share the pool of their base although they
    wait for different stages, as policies do that are trained one after another: it begins when all adapters are there.
    Shards are made one stage after another.

    Args:
        todo: the stages that are not done, each after those that it reads.
    """
    waits: dict[str, frozenset[str]] = {}
    groups: list[list[S]] = []
    home: dict[str, int] = {}  # stage → its group
    for stage in todo:
        parents = {parent.name for parent in stage.inputs.values()} & waits.keys()
        waits[stage.name] = frozenset(parents).union(*(waits[name] for name in parents))
        needed = _needed([stage], groups, home, {})
        for number, group in enumerate(groups):
            together = waits[group[0].name] == waits[stage.name] or any(map(_has_adapter, (*group, stage)))
            if together and number not in needed and _same_pool(group[0], stage):
                break
        else:
            number = len(groups)
            groups.append([])
        groups[number].append(stage)
        home[stage.name] = number
    order: dict[int, None] = {}
    for number, group in enumerate(groups):
        _needed(group, groups, home, order)
        order[number] = None
    return [tuple(groups[number]) for number in order]


def _needed(
    stages: Sequence[S], groups: Sequence[Sequence[S]], home: Mapping[str, int], found: dict[int, None]
) -> dict[int, None]:
    """`found` and the groups that some stages need, each after those that it needs itself."""
    for stage in stages:
        for parent in stage.inputs.values():
            number = home.get(parent.name)
            if number is not None and number not in found:
                _needed(groups[number], groups, home, found)
                found[number] = None
    return found


def _has_adapter(step: _Step) -> bool:
    work = step.work
    return isinstance(work, ShardWork) and work.engine is not None and adapter_of(work.engine) is not None


def _same_pool(one: _Step, other: _Step) -> bool:
    first, second = one.work, other.work
    return (
        isinstance(first, ShardWork)
        and isinstance(second, ShardWork)
        and first.engine is not None
        and second.engine is not None
        and can_share(first.engine, second.engine)
        and first.placement == second.placement
    )

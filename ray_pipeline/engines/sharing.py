"""One engine for several stages: their model and its settings are the same, their LoRA adapters need not be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import EngineFactory
from ray_pipeline.engines.vllm_spec import VllmSpec


def adapter_of(factory: EngineFactory) -> str | None:
    """The LoRA adapter of the engine that a factory makes."""
    spec = spec_of(factory)
    return None if spec is None else spec.adapter


def can_share(one: EngineFactory, other: EngineFactory) -> bool:
    """Whether the calls of two stages can go to one engine."""
    return _parts(one) == _parts(other)


def open_shared(factories: Sequence[EngineFactory]) -> tuple[ChatEngine, list[ChatEngine]]:
    """One engine, and what each factory's calls go to.

    Args:
        factories: each can share with all others.
    """
    first = factories[0]
    adapters = list(dict.fromkeys(map(adapter_of, factories)))
    if len(adapters) == 1:
        engine = first()
        return engine, [engine] * len(factories)
    made: Any = first
    spec = dataclasses.replace(made.args[0], adapter=None)
    named = [adapter for adapter in adapters if adapter is not None]
    shared: Any = made.func(spec, *made.args[1:], adapters=named, **made.keywords)
    views = {adapter: shared.serving(adapter) for adapter in adapters}
    return shared, [views[adapter_of(factory)] for factory in factories]


def _parts(factory: EngineFactory) -> tuple[Any, ...]:
    """What makes an engine, comparable: two partials of the same parts are not equal."""
    if not isinstance(factory, functools.partial):
        return (factory,)
    spec = spec_of(factory)
    args = factory.args if spec is None else (dataclasses.replace(spec, adapter=None), *factory.args[1:])
    return (factory.func, args, factory.keywords)


def spec_of(factory: EngineFactory) -> VllmSpec | None:
    if not isinstance(factory, functools.partial) or not factory.args:
        return None
    spec = factory.args[0]
    return spec if isinstance(spec, VllmSpec) else None

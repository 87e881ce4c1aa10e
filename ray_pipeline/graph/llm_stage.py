"""The stage that asks one model: every LLM stage is one, with a function and settings of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.settings import Settings


def llm_stage(
    name: str,
    function: Callable[[ShardInput], Awaitable[ShardOutput]],
    tables: tuple[str, ...],
    settings: Settings,
    model: ModelSettings,
    failure: FailureSettings,
    inputs: Mapping[str, Stage],
    *,
    group: str = "",
    train: Stage | None = None,
) -> Stage:
    """A stage whose shards ask a model; its settings and what the model is decide its output.

    Args:
        train: the stage that makes the model's weights. They need not be there yet: its fingerprint stands for them.
    """
    return Stage(
        name=name,
        group=group,
        work=ShardWork(
            function=function,
            tables=tables,
            settings=settings,
            engine=model.factory(),
            placement=model.placement,
        ),
        config={**settings.decisive(), "engine": model.semantics()},
        inputs={**inputs, **({"train": train} if train is not None else {})},
        external=model.weights() if train is None else {},
    )

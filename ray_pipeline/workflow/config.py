"""The keys shared by the configurations of all workflows, and the checks of the models that they use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from ray_pipeline.config.blocks import CallsBlock, RayBlock, RunBlock
from ray_pipeline.config.messages import ConfigError, nearest
from ray_pipeline.config.settings import ConfigFile, Settings
from ray_pipeline.engines.account import Prices
from ray_pipeline.engines.base import EngineStartError
from ray_pipeline.engines.identity import ModelNotFound
from ray_pipeline.engines.models import ModelSettings, ModelUse, resolve_model
from ray_pipeline.graph.failures import FailureSettings

if TYPE_CHECKING:
    from ray_pipeline.agents.judges import SamplingSettings

ModelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

#: Why a model cannot be at an endpoint, by its purpose.
_WHY_HERE = {
    "train": "training needs local weights",
    "count tokens": "counting tokens needs a local tokenizer",
    "reward": "scores of reward models come from vLLM's pooling",
}


def judge_uses(
    key: str, model: str, asked: Mapping[str, SamplingSettings], own: SamplingSettings | None
) -> Iterator[ModelUse]:
    """What a judge, debater or reviewer uses a model for.

    Args:
        key: of its block.
        asked: the samplings that it shares with others, by their keys.
        own: the sampling of its own block.
    """
    first, *more = asked.items()
    samplings = [first, *([] if own is None else [(f"{key}.sampling", own)]), *more]
    for where, sampling in samplings:
        yield ModelUse(f"{key}.model", model, "judge", where, sampling.extra)


class RunConfig(ConfigFile):
    """The part of the YAML file shared by all workflows. A workflow adds its own blocks, `uses`, and `num_shards` (a
    property or a key)."""

    run: RunBlock = RunBlock()
    models: dict[ModelKey, ModelSettings] = Field(default_factory=dict, description="models by the key that names them")
    failure: FailureSettings = FailureSettings()
    calls: CallsBlock = CallsBlock()
    ray: RayBlock = RayBlock()

    if TYPE_CHECKING:

        @property
        def num_shards(self) -> int: ...

    def uses(self) -> Sequence[ModelUse]:
        """Every key that chooses a model; a key with several samplings is listed once for each."""
        return ()

    def page(self) -> Settings:
        """The facts of the page that are in no table; stored in the manifest, so that the page can be rebuilt."""
        return Settings()

    def workers(self) -> dict[str, float]:
        """Stage → devices that it occupies from start to end (training), for the cost of a run."""
        return {}

    # --- shared by all workflows --------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        models = values.get("models")
        if not isinstance(models, Mapping):
            return dict(values)
        return {**values, "models": {key: resolve_model(model) for key, model in models.items()}}

    def blocks(self) -> dict[str, dict[str, ModelSettings]]:
        """The blocks that models are chosen from."""
        return {"models": self.models}

    def served(self) -> dict[str, ModelSettings]:
        """Every model by its key in the file (`models.judge`)."""
        return {f"{block}.{key}": model for block, models in self.blocks().items() for key, model in models.items()}

    def without_effect(self) -> set[str]:
        """Models as in `served` that are only chosen by keys without an effect here; they may stay in the file."""
        return set()

    @model_validator(mode="after")
    def _models_are_used(self) -> RunConfig:
        blocks, used = self.blocks(), set[str]()
        for use in self.uses():
            known = blocks[use.block]
            if use.model not in known:
                raise ValueError(
                    f"{use.key} is {use.model!r}, which is not defined under {use.block}{nearest(use.model, known)}"
                )
            used.add(f"{use.block}.{use.model}")
        if idle := sorted(set(self.served()) - used - self.without_effect()):
            raise ValueError(f"{idle[0]} is not used by any stage; remove it or reference it")
        for use in self.uses():
            if use.needs_weights and not blocks[use.block][use.model].is_here:
                raise ValueError(
                    f"{use.key} is {use.model!r}, a model at an endpoint; {_WHY_HERE[use.purpose]}: "
                    "choose a model of engine vllm"
                )
        return self

    def check(self) -> None:
        for key, model in self.served().items():
            if model.chat_template is not None and not os.path.isfile(model.chat_template):
                raise ConfigError(f"{key}.chat_template: no such file {model.chat_template}")
            try:
                model.check()
            except (EngineStartError, ModelNotFound) as error:
                raise ConfigError(f"{key}: {error}") from error
        blocks = self.blocks()
        for use in self.uses():
            try:
                blocks[use.block][use.model].check_extra(use.extra)
            except EngineStartError as error:
                raise ConfigError(f"{use.sampling}.extra: {error}") from error

    def remarks(self) -> list[str]:
        """What the user should know before the run, one line each, such as keys without effect."""
        return []

    def run_folder(self, run_dir: str | None = None) -> str:
        """Absolute path or URI of the run folder."""
        return self.run.folder(run_dir)

    def calls_root(self, run_folder: str) -> str:
        """Absolute path or URI of the call log."""
        return self.calls.folder(run_folder)

    def prices(self) -> dict[str, Prices]:
        """Prices of endpoints by the model's key."""
        priced = {key: (m, m.endpoint.prices) for key, m in self.served().items() if m.endpoint is not None}
        return {key: model.charged(prices) for key, (model, prices) in priced.items() if prices is not None}

    def currency(self) -> str:
        """The currency of all prices; USD if there are none. Raises ConfigError for several currencies."""
        currencies = sorted({prices.currency for prices in self.prices().values()})
        if len(currencies) > 1:
            raise ConfigError(f"models are priced in {' and '.join(currencies)}; give all prices in one currency")
        return currencies[0] if currencies else "USD"

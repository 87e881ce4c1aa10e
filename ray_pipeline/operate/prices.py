"""Rates and prices, each with its source and date; without them nothing is priced."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
from typing import Any

import yaml
from pydantic import Field, ValidationError

from ray_pipeline.config.loading import NOT_YAML
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.account import Prices
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.spending import Budget
from ray_pipeline.workflow.config import RunConfig


class Sourced(Settings):
    """A rate with its source and date."""

    source: str = Field(min_length=3, description="a benchmark and its address, or who measured it on what")
    date: datetime.date


class ModelRate(Sourced):
    """Tokens a second of one device (GPU) under load, for a key of `models`.

    Attributes:
        spread: share by which it may be off to either side, for the interval.
    """

    prompt_tokens_per_s: float = Field(gt=0)
    completion_tokens_per_s: float = Field(gt=0)
    spread: float = Field(0.25, ge=0, lt=1)


class TrainRate(Sourced):
    """Tokens a second of one training worker, forward and backward."""

    tokens_per_s: float = Field(gt=0)
    spread: float = Field(0.25, ge=0, lt=1)


class CallTime(Sourced):
    """Device seconds of one call of a stage, with an interval: what a probe measures."""

    seconds_per_call: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)


class ReplyTokens(Sourced):
    """Mean completion tokens of a call, by stage."""

    tokens: dict[str, float]


class KeptShare(Sourced):
    """Share of the candidates that become KTO rows."""

    share: float = Field(ge=0, le=1)


class DevicePrice(Sourced):
    """Price of one device for an hour."""

    price: float = Field(ge=0)
    currency: str = "USD"


class Rates(Settings):
    """The rates file of `quorum plan`. There are no defaults: what is not given is not planned.

    Attributes:
        models: by key of `models`.
        reply_tokens: where a stage is missing, its max_tokens are taken, which is an upper bound.
        kept_share: needed to plan training.
    """

    models: dict[str, ModelRate] = Field(default_factory=dict)
    stages: dict[str, CallTime] = Field(default_factory=dict, description="go before the rates of the stage's model")
    reply_tokens: ReplyTokens | None = None
    train: TrainRate | None = None
    kept_share: KeptShare | None = None
    device_hour: DevicePrice | None = None


def read_rates(path: str) -> Rates:
    """Raises ConfigError, naming the file and the key."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
        return Rates.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: {where}: {problem['msg']}; every rate needs a source and a date") from error
    except (OSError, *NOT_YAML) as error:
        raise ConfigError(f"{path} cannot be read as rates: {error}") from error


def listed_prices(model: ModelSettings) -> Prices | None:
    """Prices of a model at an endpoint: those of the configuration, else those that the package genai-prices lists for
    its name at that address, with their date; None where neither has any.

    Listed prices are for plans. They are no prices of a run: `budget` and `--max-cost` need the user's own.
    """
    endpoint = model.endpoint
    if endpoint is None or endpoint.prices is not None:
        return None if endpoint is None or endpoint.prices is None else model.charged(endpoint.prices)
    try:
        genai_prices: Any = importlib.import_module("genai_prices")
    except ImportError:
        return None

    def of(**usage: int) -> tuple[float, Any]:
        found = genai_prices.calc_price(
            genai_prices.Usage(**usage), model_ref=model.model, provider_api_url=endpoint.base_url
        )
        return 1000 * float(found.total_price), found.model

    try:
        price_in, about = of(input_tokens=1000)
        price_out, _ = of(output_tokens=1000)
    except (LookupError, ValueError):
        return None
    checked = getattr(getattr(about, "provenance", None), "last_verified", None) or "no date given"
    version = importlib.metadata.version("genai-prices")
    found = Prices(input=price_in, output=price_out, source=f"list price of genai-prices {version}, {checked}")
    return model.charged(found)


def given_price(price: float, currency: str) -> DevicePrice:
    """A price from the command line."""
    return DevicePrice(price=price, currency=currency, source="given by the user", date=datetime.date.today())


def budget_of(config: RunConfig, max_cost: float | None, device_hour: float | None) -> Budget:
    """The limit that `quorum run --max-cost` sets.

    Raises:
        ConfigError: a limit without any price, a negative price, or prices in two currencies.
    """
    for name, value in (("--max-cost", max_cost), ("--device-hour", device_hour)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value:g}; it cannot be negative")
    if max_cost is not None and device_hour is None and not config.prices():
        raise ConfigError(
            "--max-cost needs a price: --device-hour for devices of your own, or models.….endpoint.prices"
        )
    return Budget(max_cost, device_hour, config.currency(), config.workers())

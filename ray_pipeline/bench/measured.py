"""The list of measured models: hub names, folders, blocks of keys, or run folders whose policy is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.models import ModelSettings, resolve_model, shown_name
from ray_pipeline.graph.results import of_final_round, of_role, read_run
from ray_pipeline.store.files import Folder


class Origin(Settings):
    """Where a measured model comes from."""

    run: str | None = Field(
        None, description="a run folder of dmapo, fellowship or baselines. Its policy is served as the run served it"
    )
    policy: str | None = Field(None, description="which one, where the run trained several")
    shown: str = Field(
        "", description="the model's name for readers; for a policy, that of the model it was trained from"
    )
    curating: tuple[str, ...] = Field((), description="names of the models whose judgements made its training data")


def measured_models(models: Sequence[Any], defaults: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name → model block, and name → origin, of the list `models`.

    Args:
        defaults: keys that every model has unless it sets its own.

    Raises:
        ConfigError: an item that is not a model, a run without such a policy, or two models with the same name.
    """
    blocks: dict[str, Any] = {}
    origins: dict[str, Any] = {}
    for number, item in enumerate(models):
        where = f"models.{number}"
        if isinstance(item, str):
            item = {"run": item} if Folder(item).exists("manifest.json") else {"model": item}
        if not isinstance(item, Mapping):
            raise ConfigError(f"{where} must be a model's name, a run folder or a block of keys, not {item!r}")
        if "settings" in item:  # as runs from before `origins` keep it in their manifests
            name, block = item["name"], item["settings"]
            origin = {key: item[key] for key in Origin.model_fields if key in item}
        else:
            name, block, origin = _written(where, item, defaults if isinstance(defaults, Mapping) else {})
        if name in blocks:
            raise ConfigError(f"two models are called {name}; give one of them a `name`")
        blocks[name], origins[name] = block, origin
    return blocks, origins


def _written(where: str, item: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Name, model block and origin of an item as a user writes it."""
    own = {key: item[key] for key in ("run", "policy") if key in item}
    keys = {key: value for key, value in item.items() if key not in ("name", *own)}
    if "run" in own:
        block, origin = _policy_of(where, own, keys)
        return item.get("name") or _short(str(own["run"])), block, {**origin, **own}
    if "policy" in own:
        raise ConfigError(f"{where}.policy has no effect without run; remove it or name a run folder")
    if not isinstance(keys.get("model"), str):
        raise ConfigError(f"{where} names no model: set `model` (or `run`, a run folder)")
    name = item.get("name") or _short(keys.get("adapter") or keys["model"])
    return name, resolve_model({**defaults, **keys}), {"shown": shown_name(keys["model"])}


def _short(name: str) -> str:
    """A name for the tables from a path, a hub name or `pocket:policy`."""
    last = re.split(r"[/\\:]", name.partition("?")[0].rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)[:64]


def _policy_of(where: str, own: Mapping[str, Any], keys: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A run's policy, on the settings that its base model had there."""
    try:
        run = read_run(str(own["run"]))
        base = dict(run.config["models"][run.config["train"]["model"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}.run: {own['run']} is not a run folder with a policy ({type(error).__name__})"
        ) from error
    trained = {r.name.removeprefix("train").removeprefix("-"): r for r in of_role(run.results, "policy")}
    label, final = own.get("policy"), of_role(of_final_round(run.results), "policy")
    if label is None and len(final) == 1:
        label = next(name for name, result in trained.items() if result is final[0])
    if label not in trained:
        labels = ", ".join(name or "its only policy" for name in trained) or "none that is trained"
        problem = f"has no policy {label!r}" if label is not None else "has several policies: choose one by `policy`"
        raise ConfigError(
            f"{where}: the run {own['run']} {problem if trained else 'has no policy'}; there are {labels}"
        )
    folder = Folder(trained[label].folder)
    save = "both" if "merged" in folder.folders() else "adapter"
    curating = sorted(set((run.page.get("curating") or {}).values()))
    try:
        settings = ModelSettings.model_validate({**base, **keys}).trained(folder.location, save)
    except ValidationError as error:
        raise ConfigError(f"{where}: the run's base model cannot be read ({error.errors()[0]['msg']})") from error
    return settings, {"shown": shown_name(base["model"]), "curating": curating}

"""What `quorum run benchmarks` reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.questions import BenchmarksSettings
from ray_pipeline.bench.report import BenchmarksPage, MeasuredModel, judging_model
from ray_pipeline.bench.stages import benchmark_samplings, check_benchmarks
from ray_pipeline.config import (
    CallsBlock,
    ConfigError,
    RayBlock,
    RunBlock,
    check_models,
    check_sampling,
)
from ray_pipeline.config import _resolve_model as resolve_model
from ray_pipeline.config import _shown as shown_model
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import check_num_shards
from ray_pipeline.store.settings import Settings

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Candidate(Settings):
    """One model of the list `models`: the keys of a model, or a run folder whose policy is measured.

    In the YAML a plain text is a run folder (if it holds a manifest.json) or what `model` takes.

    Attributes:
        name: in the tables; default: the last part of the model's or the run's name.
        run: a run folder of dmapo or baselines. Its policy is served as the run served it.
        policy: which one, where the run trained several.
    """

    name: str = Field(pattern=_NAME)
    settings: ModelSettings
    run: str | None = None
    policy: str | None = None
    shown: str = ""
    curating: tuple[str, ...] = ()


class BenchmarksConfig(Settings):
    """Everything that `quorum run benchmarks` reads.

    Attributes:
        models: what is measured, see `Candidate`.
        model_defaults: keys of a model that every one of the list has unless it says otherwise.
        judges: the judging models by the keys that the benchmarks name.
    """

    run: RunBlock = RunBlock(name="benchmarks")
    models: tuple[Candidate, ...] = Field(min_length=1)
    model_defaults: dict[str, Any] = Field(default_factory=dict)
    judges: dict[Annotated[str, Field(pattern=_NAME)], ModelSettings] = Field(default_factory=dict)
    benchmarks: BenchmarksSettings
    num_shards: int = 16
    failure: FailureSettings = FailureSettings()
    calls: CallsBlock = CallsBlock()
    ray: RayBlock = RayBlock()

    @model_validator(mode="before")
    @classmethod
    def _candidates(cls, values: Any) -> Any:
        """Write every model of the list out."""
        if not isinstance(values, Mapping) or not isinstance(values.get("models"), (list, tuple)):
            return values
        defaults = values.get("model_defaults") or {}
        found = [_candidate(number, one, defaults) for number, one in enumerate(values["models"])]
        judges = values.get("judges")
        if isinstance(judges, Mapping):
            judges = {key: resolve_model(model) for key, model in judges.items()}
        return {**values, "models": found, **({"judges": judges} if judges is not None else {})}

    @field_validator("num_shards")
    @classmethod
    def _shards(cls, num_shards: int) -> int:
        return check_num_shards(num_shards)

    @model_validator(mode="after")
    def _consistent(self) -> BenchmarksConfig:
        names = [c.name for c in self.models]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two models are called {', '.join(twice)}; give one of them a `name`")
        if "floors" in names:
            raise ValueError("floors is no name of a model: the tables use it; give that model another `name`")
        for key in self.benchmarks.judges:
            if key not in self.judges:
                known = f"there are {', '.join(self.judges)}" if self.judges else "there are none"
                raise ValueError(f"benchmarks: the judge is {key!r}, and judges has no such key; {known}")
        if idle := sorted(set(self.judges) - set(self.benchmarks.judges)):
            raise ValueError(f"judges.{idle[0]} is read by no benchmark; remove it, or name it in a benchmark's judge")
        mt = self.benchmarks.mt_bench
        if mt is not None and "pairwise" in mt.modes and mt.against not in names:
            raise ValueError(
                f"benchmarks.mt_bench.against is {mt.against!r}, which is no model of this run; there are "
                f"{', '.join(names)}"
            )
        return self

    def measured(self) -> dict[str, ModelSettings]:
        return {c.name: c.settings for c in self.models}

    @functools.cached_property
    def _page(self) -> BenchmarksPage:
        return BenchmarksPage(
            run_name=self.run.name,
            benchmarks=self.benchmarks,
            models={
                c.name: MeasuredModel(
                    shown=c.shown or shown_model(c.settings.model),
                    identity="+".join(c.settings.weights().values()),
                    curating=c.curating,
                )
                for c in self.models
            },
            judges={key: judging_model(model, shown_model(model.model)) for key, model in self.judges.items()},
        )

    def page(self) -> BenchmarksPage:
        """What the report says beside the tables."""
        return self._page

    def run_folder(self, run_dir: str | None = None) -> str:
        return self.run.folder(run_dir)

    def calls_root(self, run_folder: str) -> str:
        return self.calls.folder(run_folder)

    def check(self) -> None:
        """What types cannot say. Raises ConfigError or TemplateError."""
        check_models(self.judges)
        for number, candidate in enumerate(self.models):
            try:
                check_models({candidate.name: candidate.settings})
            except ConfigError as error:
                raise ConfigError(f"models.{number}: {error}") from error
        try:
            check_benchmarks(self.benchmarks)
        except BenchmarkFileError as error:
            raise ConfigError(f"benchmarks: {error}") from error
        # A judge and a measured model may have the same name, so the answering models are looked at by themselves.
        answered, judged = benchmark_samplings(self.benchmarks, list(self.measured()))
        check_sampling(self.measured(), answered)
        check_sampling(self.judges, judged)


# --- the list of models -----------------------------------------------------------------------------------------------


def _candidate(number: int, given: Any, defaults: Any) -> Any:
    if isinstance(given, str):
        given = {"run": given} if Folder(given).exists("manifest.json") else {"model": given}
    if not isinstance(given, Mapping) or "settings" in given:  # Already written out, or for the types to refuse.
        return given
    own = {key: given[key] for key in ("name", "run", "policy") if key in given}
    keys = {key: value for key, value in given.items() if key not in own}
    if "run" in own:
        return {**_policy_of(number, own, keys), **own, "name": own.get("name") or _short(own["run"])}
    if "policy" in own:
        raise ValueError(f"models.{number}.policy is read only together with run; remove it or name a run folder")
    if not isinstance(keys.get("model"), str):
        raise ValueError(f"models.{number} names no model: give `model` (or `run`, a run folder)")
    name = own.get("name") or _short(keys.get("adapter") or keys["model"])
    shown = keys["model"]
    settings = resolve_model({**(defaults if isinstance(defaults, Mapping) else {}), **keys})
    return {"name": name, "settings": settings, "shown": shown_model(str(shown))}


def _short(name: str) -> str:
    """A name for the tables from a path, a hub name or `pocket:policy`."""
    last = re.split(r"[/\\:]", name.partition("?")[0].rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)[:64]


def _policy_of(number: int, own: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A run's policy, on the settings that its base model had there."""
    where, folder = f"models.{number}", Folder(str(own["run"]))
    try:
        manifest = folder.read_json("manifest.json")
        stages, config = manifest["stages"], manifest["config"]
        base = dict(config["models"][config["train"]["model"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}.run: {own['run']} is no run folder with a policy ({type(error).__name__})"
        ) from error
    done = {name: entry for name, entry in stages.items() if entry.get("status") == "done"}
    trained = {name.removeprefix("train").removeprefix("-"): entry for name, entry in done.items()
               if name == "train" or name.startswith("train-")}  # fmt: skip
    label = own.get("policy")
    if label is None and len(trained) == 1:
        label = next(iter(trained))
    if label not in trained:
        labels = ", ".join(name or "its only policy" for name in trained) or "none that is trained"
        asked = f"has no policy {label!r}" if label is not None else "has several policies: name one by `policy`"
        raise ValueError(f"{where}: the run {own['run']} {asked if trained else 'has no policy'}; there are {labels}")
    weights = (folder / trained[label]["path"] / "merged").location
    report = manifest.get("report") or {}
    curating = sorted(set((report.get("curating") or {}).values()))
    try:
        settings = ModelSettings.model_validate({**base, **keys}).trained(weights)
    except ValidationError as error:
        raise ValueError(f"{where}: the run's base model cannot be read ({error.errors()[0]['msg']})") from error
    return {"settings": settings, "shown": shown_model(base["model"]), "curating": curating}

"""The runs of a folder, one line each: what each was, how far it got and what came of it.

Only manifests, heartbeats and names are read, so that many runs are listed at once. A folder that holds no run, or a
damaged one, is a line of its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ray_pipeline.engines.models import shown_name
from ray_pipeline.graph.heartbeat import BEAT_SECONDS
from ray_pipeline.graph.results import Run, of_role, read_run
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

State = Literal["done", "running", "stopped", "failed", "unfinished", "damaged", "no run"]


@dataclasses.dataclass(frozen=True)
class ListedRun:
    """One folder.

    Attributes:
        date: when its manifest was last written, in local time; "" without one.
        models: display names, in the order of the configuration.
        method: training methods; "" where nothing is trained.
        state: stopped: its heartbeat stands still, so it was killed or lost its storage.
        result: the headline of its report, the rows that it made, or why it has neither.
    """

    folder: str
    date: str = ""
    workflow: str = ""
    models: Sequence[str] = ()
    method: str = ""
    state: State = "no run"
    result: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of `COLUMNS`."""
        return (self.date, self.state, self.workflow, self.folder, ", ".join(self.models), self.method, self.result)


COLUMNS = ("date", "state", "workflow", "run folder", "models", "method", "result")


def list_runs(root: str, sleep: Callable[[float], None] = time.sleep) -> list[ListedRun]:
    """The runs directly below a folder, newest first, then the folders without a run. A folder that is a run itself is
    listed alone.

    Args:
        sleep: replaced in tests; heartbeats are watched once, all together.

    Raises:
        StoreError: there is no such folder.
    """
    top = Folder(root)
    if not top.exists():
        raise StoreError(f"no folder {top.location}; `quorum run` makes runs in run.root of its configuration")
    places = [top] if top.exists("manifest.json") else [top / name for name in top.folders() if not _is_link(top, name)]
    beats = [_beat(place) for place in places]
    if any(beat is not None for beat in beats):
        sleep(1.5 * BEAT_SECONDS)
    found = [
        (_changed(place), _listed(place, None if beat is None else beat != _beat(place)))
        for place, beat in zip(places, beats, strict=True)
    ]
    return [run for _, run in sorted(found, key=lambda one: (-one[0], one[1].folder))]


def _listed(place: Folder, alive: bool | None) -> ListedRun:
    """A folder.

    Args:
        alive: whether its heartbeat changes; None where it has none.
    """
    if not place.exists("manifest.json"):
        return ListedRun(place.location, result="it has no manifest.json")
    date = datetime.datetime.fromtimestamp(_changed(place)).strftime("%Y-%m-%d %H:%M")
    try:
        run = read_run(place.location)
        return ListedRun(
            place.location,
            date,
            run.workflow,
            _models(run.config),
            _methods(run.config),
            _state(run, alive),
            _result(run),
        )
    except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:  # whatever a foreign manifest holds
        return ListedRun(place.location, date, state="damaged", result=str(error))


def _state(run: Run, alive: bool | None) -> State:
    if alive is not None:
        return "running" if alive else "stopped"
    if any(stage.status == "failed" for stage in run.stages.values()):
        return "failed"
    return "done" if all(stage.status in ("done", "skipped") for stage in run.stages.values()) else "unfinished"


def _result(run: Run) -> str:
    """The report's headline; without a report the first failure, else the rows made, and how far the run got."""
    for page in [*of_role(run.results, "page"), *of_role(run.results, "scores")]:
        if headline := page.facts.get("headline"):
            return str(headline["text"] if isinstance(headline, Mapping) else headline)
        if page.facts:
            return ", ".join(f"{name} {value}" for name, value in page.facts.get("scores", page.facts).items())
    return "; ".join([*_failures(run), *_rows(run), f"{len(run.results)} of {len(run.stages)} stages done"])


def _failures(run: Run) -> Iterator[str]:
    for stage in run.stages.values():
        if stage.status == "failed":
            yield f"{stage.name}: {stage.error}"


def _rows(run: Run) -> Iterator[str]:
    for files in of_role(run.results, "datasets"):
        for kind, sizes in files.facts.get("rows", {}).items():
            yield f"{kind} {sizes['train'] + sizes['val']:,} rows"


def _models(config: Mapping[str, Any]) -> list[str]:
    """Names of all models under `models`, each once."""
    models = config.get("models", {})
    given = models.values() if isinstance(models, Mapping) else models
    names = [one.get("model", "") if isinstance(one, Mapping) else str(one) for one in given]
    return list(dict.fromkeys(shown_name(name) for name in names if name))


def _methods(config: Mapping[str, Any]) -> str:
    compared = config.get("baselines")
    if isinstance(compared, Mapping):
        return ", ".join(compared.get("methods", ()))
    train = config.get("train")
    return str(train.get("method", "")) if isinstance(train, Mapping) else ""


def _beat(place: Folder) -> object:
    try:
        return place.read_json("heartbeat.json")
    except FileNotFoundError:
        return None
    except StoreError:
        return "unreadable"


def _changed(place: Folder) -> float:
    """When the manifest was last written, in seconds; 0 without one."""
    if not place.exists("manifest.json"):
        return 0.0
    path = place.path("manifest.json")
    return os.path.getmtime(path) if place.is_local else place.fs.get_file_info(path).mtime.timestamp()


def _is_link(top: Folder, name: str) -> bool:
    """Whether it only points at another run, as `latest` does."""
    return top.is_local and os.path.islink(top.path(name))

"""manifest.json: what the newest run in a folder is made of. progress.json: what it is doing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ray_pipeline.graph.failures import read_failures
from ray_pipeline.graph.results import is_skipped
from ray_pipeline.graph.stage import Dag, Stage, StageResult
from ray_pipeline.graph.stage_work import Failure
from ray_pipeline.graph.versions import git_revision, versions
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.secrets import redacted

#: Failed shards that the manifest lists; the stage's own record has all.
_MOST_SHARDS = 100
_PROGRESS_SECONDS = 2.0
#: What an entry holds whether its stage is done or not.
_IDENTITY = ("group", "role", "round", "fingerprint", "path", "tables", "inputs")


class Manifest:
    """Writes both files of one run.

    Args:
        config: the resolved configuration.
        head: what else the manifest holds beside its stages.
        partial: the DAG is a part of the stored run's; the entries of its other stages are kept.
    """

    def __init__(
        self,
        folder: Folder,
        dag: Dag,
        config: Mapping[str, Any],
        head: Mapping[str, Any],
        partial: bool = False,
    ) -> None:
        self._folder, self._dag = folder, dag
        self._kept = redacted(_waiting(folder.read_json("manifest.json")["stages"], dag) if partial else {})
        self._entries: dict[str, tuple[StageResult | None, bool, dict[str, Any]]] = {}
        self._last = 0.0
        folder.write_json("progress.json", [])  # what an earlier session did is over
        self._head = {
            "dag": dag.name,
            "config_digest": digest(dict(config)),
            "config": dict(config),
            **head,
            "versions": versions(),
            "git_revision": git_revision(),
        }

    @property
    def stages(self) -> list[Stage]:
        """Those of the DAG."""
        return self._dag.stages

    def write(self, results: Mapping[str, StageResult], failures: Mapping[str, Failure]) -> None:
        stages = dict(self._kept)
        for stage in self._dag.stages:
            if (failure := failures.get(stage.name)) is not None:
                stages[stage.name] = redacted(self._failed(stage, failure))
            else:
                stages[stage.name] = self._entry(stage, results.get(stage.name), is_skipped(stage, results))
        self._folder.write_json("manifest.json", {**self._head, "stages": stages})

    def _entry(self, stage: Stage, result: StageResult | None, skipped: bool) -> dict[str, Any]:
        """The entry of a stage that is done, skipped or waiting. It is kept: the manifest is written whenever a stage
        ends, and to make all entries each time would take quadratic time."""
        known = self._entries.get(stage.name)
        if known is None or known[0] is not result or known[1] != skipped:
            state = {"status": "skipped"} if skipped else {}
            if result is not None:
                state = {"status": "done", **result.plain()}
            known = self._entries[stage.name] = result, skipped, redacted(stage_entry(stage) | state)
        return known[2]

    def _failed(self, stage: Stage, failure: Failure) -> dict[str, Any]:
        entry = stage_entry(stage) | {"status": "failed", "error": failure.reason}
        if shards := read_failures(self._folder / stage.folder_name):
            entry["failed_shards"] = [dataclasses.asdict(f) for f in list(shards.values())[:_MOST_SHARDS]]
        return entry

    def progress(self, stages: list[dict[str, Any]], last: bool) -> None:
        if last or time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._folder.write_json("progress.json", stages)


def stage_entry(stage: Stage) -> dict[str, Any]:
    """The manifest's entry of a stage that is not done."""
    return {
        "group": stage.group_name,
        "role": stage.role_name,
        **({"round": stage.round} if stage.round else {}),
        "fingerprint": stage.fingerprint,
        "path": stage.folder_name,
        "tables": list(stage.work.tables),
        "inputs": {role: parent.name for role, parent in stage.inputs.items()},
        "status": "waiting",
    }


def _waiting(stored: Mapping[str, Mapping[str, Any]], dag: Dag) -> dict[str, Mapping[str, Any]]:
    """The entries of a stored run; a stage outside the DAG waits again if it was made, directly or through others, from
    an output that the DAG changes. Its folder stays, and so does its path."""
    made = {stage.name: stage.fingerprint for stage in dag.stages}
    changed = {name for name, new in made.items() if name not in stored or stored[name]["fingerprint"] != new}
    entries: dict[str, Mapping[str, Any]] = {}
    for name, entry in stored.items():  # every stage comes after those that it reads
        if name not in made and changed & set(entry.get("inputs", {}).values()):
            changed.add(name)
            entry = {key: entry[key] for key in _IDENTITY if key in entry} | {"status": "waiting"}
        entries[name] = entry
    return entries

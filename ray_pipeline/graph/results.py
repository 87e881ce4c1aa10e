"""Read a run folder back: what its manifest says, and the results of its stages."""

from __future__ import annotations

import dataclasses
from typing import Any

from ray_pipeline.graph.stage import StageRef, StageResult
from ray_pipeline.store.files import Folder, StoreError, point_at


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, its manifest, and the results of the stages that are done, by name."""

    folder: Folder
    manifest: dict[str, Any]
    results: dict[str, StageResult]

    def show(self, view: str, name: str) -> Folder:
        """Point a view at a folder of the run; returns where to look: the view, or without links the folder itself."""
        point_at(self.folder, view, name)
        return self.folder / (view if self.folder.is_local else name)


def read_run(location: str) -> Run:
    """Raises StoreError when the folder holds no run, naming it."""
    folder = Folder(location)
    try:
        manifest = folder.read_json("manifest.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{folder.location} holds no run (no manifest.json there); `quorum run` makes one") from error
    try:
        return Run(folder, manifest, _results(folder, manifest))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{folder.uri('manifest.json')} is no manifest ({type(error).__name__}: {error}); run the same command "
            "again to write it anew: it finds what is done in the stage folders"
        ) from error


def _results(folder: Folder, manifest: dict[str, Any]) -> dict[str, StageResult]:
    num_shards = manifest["num_shards"]
    found: dict[str, StageResult] = {}
    for name, entry in manifest["stages"].items():
        if entry["status"] == "done":
            place = folder.uri(entry["path"])
            ref = StageRef(name, entry["fingerprint"], place, num_shards, tuple(entry["tables"]))
            found[name] = StageResult.read(ref, entry)
    return found

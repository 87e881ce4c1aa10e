"""Leftovers in a run folder: stage folders that the newest manifest does not name.

Only folders made by Quorum are considered: `NAME-FINGERPRINT` directly in the run folder, and temporary files of
interrupted writes. The call log, the logs and everything else are never touched. Links are not followed or removed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable

import pyarrow.fs as pafs

from ray_pipeline.graph.heartbeat import BEAT_SECONDS, Heartbeat
from ray_pipeline.graph.results import Run, read_run
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import RESULT
from ray_pipeline.training.spec import POLICIES

#: A stage folder ends with its fingerprint (16 hexadecimal digits), the report of an unfinished run with a digest.
_MADE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*-([0-9a-f]{16}|[0-9a-f]{32})$")
_FINGERPRINT = re.compile(r"\b[0-9a-f]{16}\b")
_TORN = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A folder or file of the run folder that nothing refers to; `size` in bytes."""

    name: str
    is_folder: bool
    size: int


def leftovers(run: Run) -> list[Leftover]:
    """What `clean` would delete, sorted by name."""
    views = _views(run)
    kept = {stage.path for stage in run.stages.values()} | set(views.values()) | _of_policies(run, views.get("policy"))
    leftover = []
    selector = pafs.FileSelector(run.folder.path(), recursive=False)
    for info in run.folder.fs.get_file_info(selector):
        name, is_folder = info.base_name, info.type == pafs.FileType.Directory
        if run.folder.is_local and os.path.islink(info.path):
            continue
        if (is_folder and _MADE.match(name) and name not in kept) or (not is_folder and _TORN.match(name)):
            leftover.append(Leftover(name, is_folder, _size(run, name) if is_folder else info.size or 0))
    return sorted(leftover, key=lambda left: left.name)


def clean(run: Run, say: Callable[[str], None], beat_seconds: float = BEAT_SECONDS) -> list[Leftover]:
    """Delete the leftovers and return them.

    Raises:
        RunBusy: the run is active.
        StoreError: a name leads out of the run folder, or something cannot be deleted.
    """
    with Heartbeat(run.folder, beat_seconds=beat_seconds, say=say):
        # Read again under the heartbeat: a run may have ended in between and now refer to one of them.
        leftover = leftovers(read_run(run.folder.location))
        for left in leftover:
            path = run.folder.path(left.name)
            try:
                if not run.folder.is_local:
                    (run.folder.delete_folder if left.is_folder else run.folder.delete)(left.name)
                elif left.is_folder:
                    shutil.rmtree(path)  # refuses a link, and removes links inside without following them
                else:
                    os.unlink(path)
            except OSError as error:
                raise StoreError(
                    f"cannot delete {path} ({error}); leftovers before it are deleted, fix this one and rerun"
                ) from error
            say(f"deleted {left.name} ({size_text(left.size)})")
    return leftover


def _views(run: Run) -> dict[str, str]:
    """View → folder that it links to: a policy stays usable after `quorum regate`."""
    if not run.folder.is_local:
        return {}
    with os.scandir(run.folder.path()) as found:
        return {
            entry.name: os.path.basename(os.readlink(entry.path).rstrip("/")) for entry in found if entry.is_symlink()
        }


def _of_policies(run: Run, shown: str | None) -> set[str]:
    """Folders of everything that the policies that exist were made from: their datasets, back to the prompts."""
    todo = [stage.path for stage in run.stages.values() if stage.role in POLICIES] + ([shown] if shown else [])
    found = set[str]()
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += _inputs(run, name)
    return found


def _inputs(run: Run, name: str) -> list[str]:
    """Folders that an output was made from. Results of earlier versions do not have them: there the card of a policy
    names its dataset, and the manifest the stages before."""
    inputs: list[str] | None = (run.folder / name).load(RESULT, lambda value: [*value["inputs"].values()], None)
    if inputs is not None:
        return inputs
    for part in ("merged", "adapter"):
        card = run.folder / name / part
        if card.exists("README.md"):
            fingerprints = set(_FINGERPRINT.findall(card.read_bytes("README.md").decode(errors="replace")))
            return [of for of in run.folder.folders() if of != name and of[-16:] in fingerprints and _MADE.match(of)]
    return []


def _size(run: Run, name: str) -> int:
    if run.folder.is_local:
        total = 0
        for place, _, files in os.walk(run.folder.path(name), followlinks=False):
            total += sum(os.lstat(os.path.join(place, file)).st_size for file in files)
        return total
    infos = run.folder.fs.get_file_info(pafs.FileSelector(run.folder.path(name), recursive=True))
    return sum(info.size or 0 for info in infos)


def size_text(size: float) -> str:
    """Bytes as text: 999 B, 1.0 kB, …"""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

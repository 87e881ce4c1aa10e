"""Checkpoints are verified before a training resumes from them; if the newest is damaged, the one before it is used.

Each rank writes the sizes and checksums of its files into the checkpoint. A damaged checkpoint gets a mark and keeps
its name: Ray Train's records name it, and Ray Train deletes it when newer ones are there. Checkpoints of older versions
have no checksums and are used as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_pipeline.store.files import Folder

#: Ray Train's record of the checkpoints of a run.
SNAPSHOT = "checkpoint_manager_snapshot.json"
_CHECKSUMS = "checksums-"
_MARK = "damaged.json"
_STATE = "trainer_state.json"
_BLOCK = 2**22


def checkpoint_name(run: Folder, step: int) -> str:
    """Name for the checkpoint of a step; another one when a damaged checkpoint has the first."""
    name, number = f"step-{step:08d}", 1
    while _is_marked(run, name if number == 1 else f"{name}-{number}"):
        number += 1
    return name if number == 1 else f"{name}-{number}"


def write_checksums(folder: Path, rank: int) -> None:
    """Add the sizes and checksums of a rank's files to its part of a checkpoint."""
    part = Folder(str(folder))
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    (folder / f"{_CHECKSUMS}{rank}.json").write_text(json.dumps({name: _measured(part, name) for name in files}))


def check_checkpoints(run: Folder, warn: Callable[[str], None]) -> None:
    """Mark the damaged checkpoints of a run that are newer than its newest whole one, and set a damaged record aside.

    Args:
        run: Ray Train's folder of the run.
        warn: called with a line for each.
    """

    def recorded(value: Any) -> str | None:
        names = [result["checkpoint_dir_name"] for result in value["checkpoint_results"]]
        if lost := sorted(set(names) - set(run.folders())):
            raise ValueError(f"{lost[0]} is missing")
        return max(names, default=None)

    newest = run.load(SNAPSHOT, recorded, warn)
    for name in _names(run, newest):
        if _is_marked(run, name):
            continue
        reason = _damage(run / name, checked=newest is None)
        if reason is None:
            return
        run.write_json(f"{name}/{_MARK}", {"reason": reason})
        warn(f"the checkpoint {run.uri(name)} is damaged ({reason}); training resumes from the one before it, if any")


def newest_checkpoint(run: Folder, recorded: str | None) -> str | None:
    """The newest checkpoint without a mark.

    Args:
        recorded: the newest that Ray Train's record has. What is newer was not wholly written.
    """
    return next((name for name in _names(run, recorded) if not _is_marked(run, name)), None)


def _names(run: Folder, newest: str | None) -> list[str]:
    """Checkpoints from `newest` on backwards; without a record all of them, if there was one that was set aside."""
    if newest is None and not any(name.startswith(f"{SNAPSHOT}.damaged-") for name in run.names()):
        return []
    names = [name for name in run.folders() if name.startswith("step-")]
    return [name for name in reversed(names) if newest is None or name <= newest]


def _is_marked(run: Folder, name: str) -> bool:
    return run.exists(f"{name}/{_MARK}")


def _damage(checkpoint: Folder, checked: bool) -> str | None:
    """Why a checkpoint cannot be used, or None.

    Args:
        checked: one without checksums cannot.
    """
    records = [name for name in checkpoint.names(".json") if name.startswith(_CHECKSUMS)]
    if not checkpoint.exists(_STATE):
        return f"{_STATE} is missing"
    stored: dict[str, Any] = {}
    for record in records:
        try:
            stored |= json.loads(checkpoint.read_bytes(record))
        except (ValueError, TypeError):
            return f"{record} is not valid JSON"
    if (records or checked) and _STATE not in stored:  # rank 0's
        return "its checksums are missing"
    for name, measured in stored.items():
        if not checkpoint.exists(name):
            return f"{name} is missing"
        if _measured(checkpoint, name) != measured:
            return f"{name} does not match its checksum"
    return None


def _measured(folder: Folder, name: str) -> list[int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with folder.fs.open_input_stream(folder.path(name), compression=None) as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]

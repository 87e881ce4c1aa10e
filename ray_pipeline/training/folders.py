"""Folders that are published atomically."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial_folder(final: Path) -> Path:
    """Name of the sibling in which a folder is built; the same on every worker."""
    return final.with_name(f".{final.name}.partial")


def clear(folder: Path) -> None:
    """Remove the leftovers of an earlier attempt, if any."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(final: Path) -> None:
    """Flush the partial folder to disk and rename it to its final name, replacing an older one.

    If the process is killed at any moment, the final name is the older folder, the new one, or missing.
    """
    partial = partial_folder(final)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    older = final.with_name(f".{final.name}.older")
    clear(older)
    if final.exists():
        os.rename(final, older)  # a folder cannot replace a non-empty one by renaming
    os.rename(partial, final)
    clear(older)

"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial_folder(final: Path) -> Path:
    """Name of the sibling in which a folder is built; the same on every worker."""
    return final.with_name(f".{final.name}.partial")


def clear(folder: Path) -> None:
    """Remove what an earlier attempt left, if anything."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(final: Path) -> None:
    """Flush the partial folder to the disk and give it its final name, in place of an older one.

    Killed at any moment, the final name holds the older folder, the new one, or nothing.
    """
    partial = partial_folder(final)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    older = final.with_name(f".{final.name}.older")
    clear(older)
    if final.exists():
        os.rename(final, older)  # a folder cannot be renamed over one that is not empty
    os.rename(partial, final)
    clear(older)

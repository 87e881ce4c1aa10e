"""What can be wrong with a stored file, in words for the user."""

from __future__ import annotations

import errno


class StoreError(ValueError):
    """A file of a run cannot be used; the message names the file and the fix."""


class DamagedFile(StoreError):
    """A file is truncated, was changed by a fault of disk or network, or is not of its kind at all."""


class ForeignFile(StoreError):
    """A complete Parquet file written by another stage, configuration or program."""


class NotWritten(StoreError, OSError):
    """A file cannot be written; its previous version is kept. The message gives the reason and the fix."""


#: Errors of a write with a known fix; others are shown without one.
_REMEDIES = {
    errno.ENOSPC: "free disk space there",
    errno.EDQUOT: "free space within the quota",
    errno.EROFS: "mount it writable, or choose another folder",
    errno.EACCES: "give this process's user write permission there, or choose another folder",
    errno.EPERM: "give this process's user write permission there, or choose another folder",
    errno.ENOTDIR: "a file is in the place of a folder: move it, or choose another folder",
}


def not_written(location: str, error: OSError) -> NotWritten:
    """The error of a failed write, with the location and the fix."""
    remedy = _REMEDIES.get(error.errno or 0)
    reason = error.strerror if remedy and error.strerror else str(error)
    return NotWritten(
        f"cannot write {location}: {reason}; {remedy + ', then ' if remedy else ''}rerun the same command to resume"
    )

"""Locations as text, and the permissions of new local folders and files.

A *location* is a local path, a `file://` URI or the URI of any pyarrow filesystem (`s3://…`, `gs://…`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import urllib.parse

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.secrets import looks_like_key, redact


def make_folder(path: str) -> None:
    """Create a local folder and its parents for this user alone; inside a folder that a group may write in, for the
    group."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path.rstrip("/")) or "."
    make_folder(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return
    mode = os.stat(parent).st_mode
    if mode & stat.S_IWGRP and not mode & stat.S_ISVTX:  # not /tmp, which is everybody's
        os.chmod(path, 0o700 | mode & 0o2070)


def set_mode(path: str) -> None:
    """Give a new local file the reading and writing permissions of its folder: 0600 in a folder of mode 0700."""
    mode, folder = os.stat(path).st_mode & 0o666, os.stat(os.path.dirname(path) or ".").st_mode
    group = folder & 0o060 if folder & stat.S_IWGRP and not folder & stat.S_ISVTX else 0
    os.chmod(path, mode & folder | group | 0o600 & mode)


def sync_folder(path: str) -> None:
    """Make a rename survive a power cut, if the filesystem can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def normalise_location(location: str) -> str:
    """Absolute local path, or a URI without a trailing slash. `file://` URIs become local paths."""
    if location.startswith("file://"):
        location = urllib.parse.unquote(location[len("file://") :])
        if not location.startswith("/"):
            raise StoreError(f"a file URI must have an absolute path (file:///…), not file://{location}")
    if "://" in location:
        path, query = _cut_query(location)
        if looks_like_key(path + query):
            raise _with_key(path, query)
        return path.rstrip("/") + query
    return os.path.abspath(os.path.expanduser(location))


def join(location: str, name: str) -> str:
    """Location of a member. The query of a URI (endpoint, region) belongs to the filesystem and stays last."""
    if not name:
        return location
    path, query = _cut_query(location)
    return f"{path.rstrip('/')}/{name}{query}"


def parent_of(location: str) -> str:
    """Location of the folder that contains it."""
    path, query = _cut_query(location)
    return path.rpartition("/")[0] + query


def base_name(location: str) -> str:
    """Last part of a location: the name of a run folder."""
    return _cut_query(location)[0].rstrip("/").rpartition("/")[2]


def without_folders(text: str) -> str:
    """The last part of an absolute local path, for files that are published; any other text as it is."""
    if not os.path.isabs(text) or "\n" in text or text.count("/") < 2:  # "/10" is no path
        return text
    return os.path.basename(text.rstrip("/"))


def beside(location: str, suffix: str) -> str:
    """Location of the sibling folder with a suffix appended to the name."""
    path, query = _cut_query(location)
    return f"{path.rstrip('/')}{suffix}{query}"


def _cut_query(location: str) -> tuple[str, str]:
    """A URI's path, and its query with the `?`; a local path has no query."""
    if "://" not in location:
        return location, ""
    path, sign, query = location.partition("?")
    return path, sign + query


def _with_key(path: str, query: str) -> StoreError:
    """Why a location with a key in it is refused: manifests and logs contain locations."""
    host = path.partition("://")[2].rpartition("@")[2].partition("/")[0]
    named = [name for name in urllib.parse.parse_qs(query[1:]) if looks_like_key(f"?{name}=x")]
    what = f"the parameter {named[0]}" if named else "a key before the @" if "@" in path else "a key"
    return StoreError(
        f"the location of {redact(host)} contains {what}, which manifests and logs would show; set keys in the "
        "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role)"
    )

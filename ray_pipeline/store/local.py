"""Local copies of files on an object store, for libraries that need a disk: models to load, files to train on, pages to
write. A local location is its own copy, so callers need not distinguish the two.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ray_pipeline.store.errors import NotWritten, not_written
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.locations import make_folder

if TYPE_CHECKING:
    import pyarrow.fs as pafs

#: Folder of the copies, for all processes of a node. It can be deleted when no run is active, but for calls that could
#: not be written to their call log (see `calls.set_aside`).
CACHE_VARIABLE = "QUORUM_CACHE"


def local_copy(location: str) -> str:
    """Path of a local folder with the current files of `location`; a local path is returned unchanged.

    Copies are cached by the names, sizes and times of the files: changed files are fetched again, and unchanged ones
    are fetched once per node.

    Raises:
        FileNotFoundError: there are no files at the location.
        NotWritten: the cache has no space or is read-only.
    """
    if "://" not in location:
        return location
    import pyarrow.fs as pafs

    folder = Folder(location)
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"{folder.location} has no files; check the location")
    listing = [[name, info.size, info.mtime_ns] for name, info in files.items()]
    copy = cache_folder() / digest([folder.location, listing])
    try:
        make_folder(str(copy.parent))
        with FileLock(f"{copy}.lock"):
            if not copy.is_dir():
                partial = copy.with_name(f".{copy.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
                for name, info in files.items():
                    target = partial / name
                    make_folder(str(target.parent))
                    pafs.copy_files(
                        info.path,
                        str(target),
                        source_filesystem=folder.fs,
                        destination_filesystem=pafs.LocalFileSystem(),
                    )
                os.rename(partial, copy)
    except OSError as error:
        raise NotWritten(
            f"cannot copy {folder.location} to {copy}: {error}; free disk space there, or set {CACHE_VARIABLE} to "
            "another folder, then rerun the same command to resume"
        ) from error
    return str(copy)


@contextlib.contextmanager
def written_here(folder: Folder) -> Iterator[Path]:
    """A local folder to write into; its files are copied to `folder` at the end of the block, unless it raises.

    Raises:
        NotWritten: `folder` is not writable.
    """
    if folder.is_local:
        path = Path(folder.path())
        make_folder(str(path))
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="quorum-") as temporary:
        yield Path(temporary)
        upload(Path(temporary), folder)


def upload(source: Path, folder: Folder) -> None:
    """Copy the files of a local folder into `folder`, replacing files of the same names.

    Raises:
        NotWritten: a file cannot be written; the message names it.
    """
    import pyarrow.fs as pafs

    for file in sorted(source.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(source).as_posix()
        try:
            pafs.copy_files(
                str(file),
                folder.path(name),
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=folder.fs,
            )
        except OSError as error:
            raise not_written(folder.uri(name), error) from error


def cache_folder() -> Path:
    """`$QUORUM_CACHE`, or `~/.cache/quorum`."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/quorum").expanduser().absolute()


def _files(folder: Folder) -> dict[str, pafs.FileInfo]:
    """Relative name → file, sorted, for all files below a folder. Names that lead out of it are left out."""
    import pyarrow.fs as pafs

    base = folder.path()
    infos = folder.fs.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    files = {posixpath.relpath(info.path, base): info for info in infos if info.is_file}
    return {name: files[name] for name in sorted(files) if ".." not in name.split("/")}

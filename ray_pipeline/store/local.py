"""What lies on an object store, for libraries that work on a disk alone: models to load, files to train on, pages to
write. A local location is its own copy, so that callers need not ask where a run lives.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock

from ray_pipeline.store.files import Folder, NotWritten, not_written
from ray_pipeline.store.keys import digest

#: Where copies are kept, for all processes of a node. It may be deleted whenever no run is at work.
CACHE_VARIABLE = "QUORUM_CACHE"


def local_copy(location: str) -> str:
    """Path of a folder of this machine with the files that lie at `location` now. What is no URI comes back as it is.

    A copy is kept under the names, sizes and times of what was copied: what was written anew is fetched anew, and what
    is there already is not fetched twice, by whichever process.

    Raises:
        FileNotFoundError: nothing lies there.
        NotWritten: the cache has no room or is read-only.
    """
    if "://" not in location:
        return location
    folder = Folder(location)
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"{folder.location}: nothing lies there")
    listing = [[name, info.size, info.mtime_ns] for name, info in files.items()]
    copy = cache_folder() / digest([folder.location, listing])
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not copy.is_dir():
                partial = copy.with_name(f".{copy.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                for name, info in files.items():
                    target = partial / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    pafs.copy_files(
                        info.path,
                        str(target),
                        source_filesystem=folder.fs,
                        destination_filesystem=pafs.LocalFileSystem(),
                    )
                os.rename(partial, copy)
    except OSError as error:
        raise NotWritten(
            f"{folder.location} cannot be copied to {copy}: {error}. Make room there, or set {CACHE_VARIABLE} to "
            "another folder; then the same command goes on"
        ) from error
    return str(copy)


@contextlib.contextmanager
def written_here(folder: Folder) -> Iterator[Path]:
    """A local folder to write into. What is in it at the end is in `folder`, unless an error ends the block.

    Raises:
        NotWritten: `folder` cannot be written to.
    """
    if folder.is_local:
        path = Path(folder.path())
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="quorum-") as made:
        yield Path(made)
        upload(Path(made), folder)


def upload(source: Path, folder: Folder) -> None:
    """Put the files below a local folder into `folder`, in place of those of the same names.

    Raises:
        NotWritten: naming the file.
    """
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
    """The files below a folder by their names in it, sorted. A name that leads out of it is no file of it."""
    base = folder.path()
    found = folder.fs.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    files = {posixpath.relpath(info.path, base): info for info in found if info.type == pafs.FileType.File}
    return {name: files[name] for name in sorted(files) if ".." not in name.split("/")}

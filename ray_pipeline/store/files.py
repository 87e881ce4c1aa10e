"""Files on any pyarrow filesystem, written so that a reader sees a whole file or none.

A *location* is a local path, a `file://` URI or the URI of any filesystem that pyarrow knows (`s3://…`, `gs://…`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

#: Footer key that carries the fingerprint of the stage that wrote a Parquet file.
FINGERPRINT_KEY = b"quorum.fingerprint"
TABLE_KEY = b"quorum.table"

#: Object stores: what looks like a folder there is part of a name, and making one costs two requests a write.
_WITHOUT_FOLDERS = frozenset({"s3", "gcs", "abfs"})


class StoreError(ValueError):
    """A file of a run cannot be used; the message names it and says what to do."""


class TornFile(StoreError):
    """A Parquet file is cut short or is none."""


class ForeignFile(StoreError):
    """A whole Parquet file that another stage, another configuration or somebody else wrote."""


class NotWritten(StoreError, OSError):
    """A file cannot be written; what was there before is still there. The message says why and what to do."""


#: What the user can do about the reasons for which a file is not written; others say their reason alone.
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room under the quota",
    errno.EROFS: "mount it writable, or choose another folder",
    errno.EACCES: "give the user of this process the right to write there, or choose another folder",
    errno.EPERM: "give the user of this process the right to write there, or choose another folder",
    errno.ENOTDIR: "a file is where a folder must be: move it, or choose another folder",
}


def not_written(location: str, error: OSError) -> NotWritten:
    """The error of a write, with the place and the remedy."""
    remedy = _REMEDIES.get(error.errno or 0)
    reason = error.strerror if remedy and error.strerror else str(error)
    return NotWritten(
        f"{location} cannot be written: {reason}. "
        + (f"{remedy[0].upper()}{remedy[1:]}; then the same command goes on" if remedy else "The same command goes on")
    )


class Folder:
    """A folder on a pyarrow filesystem. Cheap to make, picklable, never created before something is written."""

    def __init__(self, location: str) -> None:
        self.location = normalise_location(location)
        self._fs: pafs.FileSystem | None = None
        self._base = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Folder, (self.location,))

    def __repr__(self) -> str:
        return f"Folder({self.location!r})"

    def __truediv__(self, name: str) -> Folder:
        return Folder(join(self.location, name))

    @property
    def fs(self) -> pafs.FileSystem:
        if self._fs is None:
            # Threads share folders: the base must be there before another one sees that the filesystem is.
            fs, self._base = pafs.FileSystem.from_uri(self.location)
            self._fs = fs
        return self._fs

    @property
    def parent(self) -> Folder:
        """The folder that this one lies in."""
        path, query = _cut_query(self.location)
        return Folder(path.rpartition("/")[0] + query)

    @property
    def is_local(self) -> bool:
        return "://" not in self.location

    def path(self, name: str = "") -> str:
        """Path of a member as the filesystem knows it.

        Raises:
            StoreError: the name would leave the folder.
        """
        _ = self.fs
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"the name {name!r} leaves the folder {self.location}")
        return posixpath.join(self._base, name) if name else self._base

    def uri(self, name: str = "") -> str:
        """Location of a member, for messages, manifests and other tools."""
        return join(self.location, name) if name else self.location

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound)

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the files directly in the folder; temporary files and sub-folders are left out."""
        return sorted(
            info.base_name
            for info in self._members()
            if info.type == pafs.FileType.File and info.base_name.endswith(suffix) and not _is_temporary(info.base_name)
        )

    def folders(self) -> list[str]:
        """Sorted names of the sub-folders."""
        return sorted(
            info.base_name
            for info in self._members()
            if info.type == pafs.FileType.Directory and not _is_temporary(info.base_name)
        )

    def _members(self) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(), allow_not_found=True, recursive=False)
        try:
            return list(self.fs.get_file_info(selector))
        except FileNotFoundError:
            # Arrow lists first and then asks whether the folder is there at all: it is an error when another process
            # makes the folder in between.
            return list(self.fs.get_file_info(selector))

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Put a whole file in place of what is there, or leave what is there.

        Local: written beside, flushed to the disk, renamed. Elsewhere: one upload, which object stores publish whole.

        Raises:
            NotWritten: no room, no right to write, a file in the way of a folder, or what else the filesystem says.
        """
        try:
            self._write_bytes(name, data)
        except OSError as error:
            raise not_written(self.uri(name), error) from error

    def _write_bytes(self, name: str, data: bytes) -> None:
        target = self.path(name)
        if self.fs.type_name not in _WITHOUT_FOLDERS:
            self.fs.create_dir(posixpath.dirname(target), recursive=True)
        if not self.is_local:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
            return
        beside = posixpath.join(posixpath.dirname(target), _temporary(posixpath.basename(target)))
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        _sync_folder(posixpath.dirname(target))

    def read_json(self, name: str) -> Any:
        """Raises StoreError, naming the file, when it holds no JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StoreError(f"{self.uri(name)} is not valid JSON ({error}); remove it and run again") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n").encode())

    def delete(self, name: str) -> None:
        """Delete a file; that it is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path(name))

    def write_table(
        self, name: str, table: pa.Table, *, fingerprint: str = "", kind: str = "", row_group_size: int | None = None
    ) -> int:
        """Write a Parquet file whole; equal tables give equal bytes. Returns the size in bytes."""
        metadata = {FINGERPRINT_KEY: fingerprint.encode(), TABLE_KEY: kind.encode()} if fingerprint else None
        buffer = io.BytesIO()
        # Pages end where chunks end, so a table that came in pieces would get other bytes.
        whole = _in_one_piece(table).replace_schema_metadata(metadata)
        pq.write_table(whole, buffer, compression="zstd", row_group_size=row_group_size)
        data = buffer.getvalue()
        self.write_bytes(name, data)
        return len(data)

    def check_table(self, name: str, *, fingerprint: str, kind: str = "", schema: pa.Schema | None = None) -> int:
        """Number of rows of a Parquet file, from its footer alone.

        Raises:
            FileNotFoundError: there is no such file.
            TornFile: it has no readable footer.
            ForeignFile: its footer carries another fingerprint, or not the given schema.
        """
        with self._parquet(name) as file:
            self._check_footer(name, file, fingerprint, kind)
            self._check_schema(name, file, schema)
            return int(file.metadata.num_rows)

    def read_table(
        self,
        name: str,
        *,
        fingerprint: str | None = None,
        kind: str = "",
        schema: pa.Schema | None = None,
        columns: list[str] | None = None,
    ) -> pa.Table:
        """Read a whole Parquet file, refusing one that is torn, foreign or of another schema, by name."""
        with self._parquet(name) as file:
            if fingerprint is not None:
                self._check_footer(name, file, fingerprint, kind)
            self._check_schema(name, file, schema)
            try:
                table = file.read(columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise TornFile(f"{self.uri(name)} cannot be read whole ({error}); remove it and run again") from error
        table = table.replace_schema_metadata(None)
        return table.cast(schema) if schema is not None and columns is None else table

    @contextlib.contextmanager
    def _parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        path = self.path(name)
        with self.fs.open_input_file(path) as stream:
            try:
                file = pq.ParquetFile(stream)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise TornFile(
                    f"{self.uri(name)} is cut short or is no Parquet file ({error}); it is remade on the next run"
                ) from error
            yield file

    def _check_footer(self, name: str, file: pq.ParquetFile, fingerprint: str, kind: str) -> None:
        metadata = file.schema_arrow.metadata or {}
        found = metadata.get(FINGERPRINT_KEY, b"").decode(errors="replace")
        if found != fingerprint or (kind and metadata.get(TABLE_KEY, b"") != kind.encode()):
            raise ForeignFile(
                f"{self.uri(name)} was written by another stage or configuration "
                f"(fingerprint {found or 'none'}, expected {fingerprint}); it is remade on the next run"
            )

    def _check_schema(self, name: str, file: pq.ParquetFile, schema: pa.Schema | None) -> None:
        if schema is not None and not file.schema_arrow.equals(schema):
            raise ForeignFile(f"{self.uri(name)} has other columns than expected; it is remade on the next run")


def normalise_location(location: str) -> str:
    """Absolute local path, or a URI without a trailing slash. `file://` URIs become local paths."""
    if location.startswith("file://"):
        location = urllib.parse.unquote(location[len("file://") :])
        if not location.startswith("/"):
            raise StoreError(f"file URI must have an absolute path (file:///…), not file://{location}")
    if "://" in location:
        path, query = _cut_query(location)
        _refuse_keys(path, query)
        return path.rstrip("/") + query
    return os.path.abspath(os.path.expanduser(location))


def join(location: str, name: str) -> str:
    """Location of a member. What a URI says after its `?` (endpoint, region) is of the filesystem, and stays last."""
    if not name:
        return location
    path, query = _cut_query(location)
    return f"{path.rstrip('/')}/{name}{query}"


def base_name(location: str) -> str:
    """Last part of a location: the name of a run folder."""
    return _cut_query(location)[0].rstrip("/").rpartition("/")[2]


def beside(location: str, suffix: str) -> str:
    """Location of the folder whose name is that of another one and a suffix."""
    path, query = _cut_query(location)
    return f"{path.rstrip('/')}{suffix}{query}"


def _cut_query(location: str) -> tuple[str, str]:
    """A URI's path, and its query with the `?`; of a local path nothing is cut off."""
    if "://" not in location:
        return location, ""
    path, sign, query = location.partition("?")
    return path, sign + query


def _refuse_keys(path: str, query: str) -> None:
    """Locations stand in manifests and logs, so no key may stand in a location."""
    user, at, host = path.partition("://")[2].partition("/")[0].rpartition("@")
    named = [name for name in urllib.parse.parse_qs(query[1:]) if re.search("secret|password|access_key|token", name)]
    if named or (at and ":" in user):
        what = f"the parameter {named[0]}" if named else "a key before the @"
        raise StoreError(
            f"the location of {host or path} holds {what}; manifests and logs would show it. Put keys into the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role)"
        )


def point_at(folder: Folder, name: str, target: str) -> None:
    """Make `folder/name` a view of the sibling `target`, swapped in one step (a relative symbolic link).

    Filesystems without links get nothing: there the manifest names the folder.

    Raises:
        StoreError: something that is not a link is in the way.
        NotWritten: the folder cannot be written to.
    """
    if not folder.is_local:
        return
    link = folder.path(name)
    if os.path.lexists(link) and not os.path.islink(link):
        raise StoreError(f"{link} is in the way: Quorum keeps a link of that name there. Move it and run again")
    beside = os.path.join(os.path.dirname(link), _temporary(os.path.basename(link)))
    try:
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(target, beside)
        os.replace(beside, link)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise not_written(link, error) from error


def _temporary(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}.tmp"


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _in_one_piece(table: pa.Table) -> pa.Table:
    try:
        return table.combine_chunks()
    except pa.ArrowException:  # More than 2 GB of nested text in a column fit no single piece.
        return table


def _sync_folder(path: str) -> None:
    """Make a rename survive a power cut, where the filesystem lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

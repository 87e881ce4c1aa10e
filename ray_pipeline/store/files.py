"""Files on any pyarrow filesystem, written atomically: a reader sees a whole file or none.

Reading a configuration, or the JSON files of a local run, does not import pyarrow: only tables and URIs need it.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ray_pipeline.store.errors import DamagedFile, ForeignFile, StoreError, not_written
from ray_pipeline.store.locations import join, make_folder, normalise_location, parent_of, set_mode, sync_folder
from ray_pipeline.store.outside import storable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

T = TypeVar("T")

#: Footer key with the fingerprint of the stage that wrote a Parquet file.
FINGERPRINT_KEY = b"quorum.fingerprint"
TABLE_KEY = b"quorum.table"
#: Written last into the folder of a stage: the stage is done.
RESULT = "_result.json"

#: Folders of a stage, one in the other, down to the deepest file: `kto/train/part-00000.parquet`.
_LEVELS_OF_A_STAGE = 3
#: Bytes at the end of a file that are read first for its footer.
_TAIL = 2**16

#: Object stores: folders are only parts of names there, and creating one costs two requests per write.
_WITHOUT_FOLDERS = frozenset({"s3", "gcs", "abfs"})


class Folder:
    """A folder on a pyarrow filesystem. Cheap to construct, picklable; created only when something is written."""

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
            import pyarrow.fs as pafs

            # Threads share folders: set the base before the filesystem becomes visible to another thread.
            fs, self._base = pafs.FileSystem.from_uri(self.location)
            self._fs = fs
        return self._fs

    @property
    def parent(self) -> Folder:
        """The folder that contains this one."""
        return Folder(parent_of(self.location))

    @property
    def is_local(self) -> bool:
        return "://" not in self.location

    def path(self, name: str = "") -> str:
        """Path of a member on the filesystem.

        Raises:
            StoreError: the name would leave the folder.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"the name {name!r} leaves the folder {self.location}; use a name inside it")
        base = self.location
        if not self.is_local:
            _ = self.fs
            base = self._base
        return posixpath.join(base, name) if name else base

    def uri(self, name: str = "") -> str:
        """Location of a member, for messages, manifests and other tools."""
        return join(self.location, name) if name else self.location

    def exists(self, name: str = "") -> bool:
        if self.is_local:
            return os.path.exists(self.path(name))
        return bool(self.fs.get_file_info(self.path(name)).type.name != "NotFound")

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the files directly in the folder, without temporary files and subfolders."""
        return sorted(name for name, is_folder in self._members() if not is_folder and name.endswith(suffix))

    def folders(self) -> list[str]:
        """Sorted names of the subfolders."""
        return sorted(name for name, is_folder in self._members() if is_folder)

    def _members(self) -> list[tuple[str, bool]]:
        """Name of each file and folder directly in the folder, without temporary ones, and whether it is a folder."""
        if self.is_local:
            try:
                with os.scandir(self.location) as entries:
                    found = [(entry.name, entry.is_dir()) for entry in entries if entry.is_dir() or entry.is_file()]
            except FileNotFoundError:
                return []
        else:
            import pyarrow.fs as pafs

            infos = self.fs.get_file_info(pafs.FileSelector(self.path(), allow_not_found=True, recursive=False))
            found = [(info.base_name, not info.is_file) for info in infos if info.type.name in ("File", "Directory")]
        return [(name, is_folder) for name, is_folder in found if not _is_temporary(name)]

    def make(self, shared: bool = False) -> None:
        """Create the folder if it does not exist; object stores need none. Contents follow its mode.

        Args:
            shared: let the user's group read and write in it (mode 2770); otherwise only the user can (mode 0700).

        Raises:
            NotWritten: its parent is not writable.
        """
        if not self.is_local or os.path.isdir(self.path()):
            return
        try:
            make_folder(self.path())
            if shared:
                os.chmod(self.path(), 0o2770)
        except OSError as error:
            raise not_written(self.location, error) from error

    def read_bytes(self, name: str) -> bytes:
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return file.read()
        with self.fs.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace a file atomically.

        Local: written to a temporary file, flushed to disk, renamed. Elsewhere: one upload, atomic in object stores.

        Raises:
            NotWritten: no space, no write permission, a file in the place of a folder, or another filesystem error.
        """
        try:
            self._write_bytes(name, data)
        except OSError as error:
            raise not_written(self.uri(name), error) from error

    def _write_bytes(self, name: str, data: bytes) -> None:
        target = self.path(name)
        if not self.is_local:
            if self.fs.type_name not in _WITHOUT_FOLDERS:
                self.fs.create_dir(posixpath.dirname(target), recursive=True)
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
            return
        make_folder(posixpath.dirname(target))
        beside = posixpath.join(posixpath.dirname(target), _temporary(posixpath.basename(target)))
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            set_mode(beside)
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        sync_folder(posixpath.dirname(target))

    def read_json(self, name: str, *, set_aside: bool = False) -> Any:
        """The parsed file.

        Args:
            set_aside: rename a damaged file, for one that a stage made; not for one that a process keeps writing.

        Raises:
            DamagedFile: it is not valid JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            reason, remedy = f"{self.uri(name)} is not valid JSON ({error})", "rerun the same command"
            if set_aside:
                raise DamagedFile(self.set_aside(name, f"{reason}; {remedy}")) from error
            raise DamagedFile(f"{reason}; remove it and {remedy}") from error

    def load(self, name: str, parse: Callable[[Any], T], warn: Callable[[str], None] | None) -> T | None:
        """What `parse` makes of a JSON file; None where there is none, or it cannot be used.

        Args:
            warn: called with a line when the file cannot be used, which is then set aside; None: it stays, unnamed.
        """
        try:
            return parse(json.loads(self.read_bytes(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if warn is not None:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                warn(self.set_aside(name, str(self._damaged(name, reason))))
            return None

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)
        self.write_bytes(name, (storable(text) + "\n").encode())

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path(name))

    def write_table(
        self, name: str, table: pa.Table, *, fingerprint: str = "", kind: str = "", row_group_size: int | None = None
    ) -> int:
        """Write a Parquet file atomically; equal tables give equal bytes. Returns the size in bytes."""
        from ray_pipeline.store.parquet import encode

        metadata = {FINGERPRINT_KEY: fingerprint.encode(), TABLE_KEY: kind.encode()} if fingerprint else {}
        data = encode(table, metadata, row_group_size)
        self.write_bytes(name, data)
        return len(data)

    def check_table(self, name: str, *, fingerprint: str, kind: str = "", schema: pa.Schema | None = None) -> int:
        """Number of rows of a Parquet file, from its footer alone: damage before it is found by `read_table`.

        Raises:
            FileNotFoundError: no such file.
            DamagedFile: it has no whole footer.
            ForeignFile: its footer has another fingerprint or schema.
        """
        file, _ = self._decoded(name, self._footer(name))
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
        """Read a Parquet file, after all of its checksums were verified. A damaged file is set aside.

        Raises:
            FileNotFoundError: no such file.
            DamagedFile: some of its bytes changed since they were written.
            ForeignFile: it has another fingerprint or schema.
        """
        import pyarrow as pa

        from ray_pipeline.store.schemas import RENAMED, conformed

        data = self.read_bytes(name)
        try:
            file, verified = self._decoded(name, data)
            if fingerprint is not None:
                self._check_footer(name, file, fingerprint, kind)
            self._check_schema(name, file, schema)
            try:
                # A name that the file does not have is passed over.
                table = file.read(columns=columns and [*columns, *(old for old in RENAMED if RENAMED[old] in columns)])
            except (pa.ArrowException, OSError) as error:
                if verified:  # it is as it was written, by a newer version
                    raise StoreError(
                        f"{self.uri(name)} cannot be read by pyarrow {pa.__version__} ({error}); update pyarrow"
                    ) from error
                raise self._damaged(name, error) from error
        except DamagedFile as error:
            raise DamagedFile(self.set_aside(name, str(error))) from error
        table = table.replace_schema_metadata(None)
        if schema is None:
            return table
        return conformed(table, schema, columns)

    def set_aside(self, name: str, reason: str) -> str:
        """Rename a file that cannot be used, so that it is not read again and its stage remakes it.

        It becomes `NAME.damaged-1`, or the next free number. The stage in whose folder it is loses `_result.json`:
        it is not done any more.

        Returns:
            The reason with the new name, for the user.
        """
        number = 1
        while self.exists(new := f"{name}.damaged-{number}"):
            number += 1
        try:
            self.fs.move(self.path(name), self.path(new))
        except FileNotFoundError:  # another process was first
            return reason
        except OSError as error:
            return f"{reason} (it cannot be set aside: {error}; remove it)"
        folder = self
        for _ in range(_LEVELS_OF_A_STAGE):
            if folder.exists(RESULT):
                folder.delete(RESULT)
                break
            folder = folder.parent
        return f"{reason} (set aside as {new})"

    def _footer(self, name: str) -> bytes:
        """The end of a Parquet file, from the beginning of its footer, or from an earlier place."""
        from ray_pipeline.store.parquet import Damaged, footer_size

        with self.fs.open_input_file(self.path(name)) as stream:
            size = stream.size()
            tail: bytes = stream.read_at(min(size, _TAIL), max(0, size - _TAIL))
            try:
                length = footer_size(tail[-8:])
            except Damaged as error:
                raise self._damaged(name, error) from error
            return tail[-length:] if length <= len(tail) else stream.read_at(length, max(0, size - length))

    def _decoded(self, name: str, data: bytes) -> tuple[pq.ParquetFile, bool]:
        from ray_pipeline.store.parquet import Damaged, decode

        try:
            return decode(data)
        except Damaged as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, reason: object) -> DamagedFile:
        return DamagedFile(f"{self.uri(name)} is damaged ({reason}); `quorum run` regenerates it")

    def _check_footer(self, name: str, file: pq.ParquetFile, fingerprint: str, kind: str) -> None:
        metadata = file.schema_arrow.metadata or {}
        found = metadata.get(FINGERPRINT_KEY, b"").decode(errors="replace")
        if found != fingerprint or (kind and metadata.get(TABLE_KEY, b"") != kind.encode()):
            raise ForeignFile(
                f"{self.uri(name)} was written by another stage or configuration "
                f"(fingerprint {found or 'none'}, expected {fingerprint}); `quorum run` regenerates it"
            )

    def _check_schema(self, name: str, file: pq.ParquetFile, schema: pa.Schema | None) -> None:
        import pyarrow as pa

        from ray_pipeline.store.schemas import renamed

        if schema is None:
            return
        found = renamed(file.schema_arrow, schema)
        if not found.equals(pa.schema([f for f in schema if not f.nullable or f.name in found.names])):
            raise ForeignFile(f"{self.uri(name)} has unexpected columns; `quorum run` regenerates it")


def point_at(folder: Folder, name: str, target: str) -> None:
    """Make `folder/name` a view of the sibling `target`, swapped atomically (a relative symbolic link).

    On filesystems without links it does nothing: there the manifest names the folder.

    Raises:
        StoreError: something other than a link has this name.
        NotWritten: the folder is not writable.
    """
    if not folder.is_local:
        return
    link = folder.path(name)
    if os.path.lexists(link) and not os.path.islink(link):
        raise StoreError(f"{link} is in the place of a link that Quorum writes; move it and rerun the same command")
    beside = os.path.join(os.path.dirname(link), _temporary(os.path.basename(link)))
    try:
        make_folder(os.path.dirname(link))
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

"""Where prompts come from: data sets of the Hugging Face hub, JSONL, Parquet and CSV files, and the pocket world.

Every source is read as a stream of rows (text or chat messages, and where they stood), and has a digest of its
content that goes into the fingerprint of the prompts stage. Files may lie on any filesystem that pyarrow knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Annotated, Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from ray_pipeline.store.files import Folder, StoreError, normalise_location
from ray_pipeline.store.keys import digest
from ray_pipeline.store.settings import Settings

_BATCH_ROWS = 1024
_BLOCK_BYTES = 1 << 23
_WILDCARD = re.compile(r"[*?\[]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: JSON can say "\\ud83d" without its second half; no UTF-8 file can hold that.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class InputError(ValueError):
    """A source of prompts cannot be used; the message names the file, the column or row, and the remedy."""


# --- configuration ----------------------------------------------------------------------------------------------------


class _Columns(Settings):
    """What every table-like source has.

    Attributes:
        column: the prompt: text, or a list of chat messages (role, content), which is cut after its last user turn.
        system: system message for rows that bring none of their own.
        task_type_column: column with the kind of task; "general" where there is none.
        source_column: column that says where a row is from; `label` where there is none.
        label: name of the source in the tables; by default the data set's or the file's name.
        limit: at most so many distinct prompts of this source, chosen by hash.
    """

    column: str
    system: str | None = None
    task_type_column: str | None = None
    source_column: str | None = None
    label: str | None = None
    limit: int | None = Field(None, ge=1)


class HuggingFaceSource(_Columns):
    """A data set of the Hugging Face hub (or a local folder that `datasets.load_dataset` opens)."""

    type: Literal["huggingface"] = "huggingface"
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class _FileSource(_Columns):
    """`path` is a local path or the URI of any pyarrow filesystem, and may hold *, ** and ?."""

    path: str

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The name in place of the path: files that were moved are the same prompts (their contents have digests)."""
        return {**super().decisive({*exclude, "path"}), "label": label_of(cast(Source, self))}


class JsonlSource(_FileSource):
    type: Literal["jsonl"] = "jsonl"


class ParquetSource(_FileSource):
    type: Literal["parquet"] = "parquet"


class CsvSource(_FileSource):
    type: Literal["csv"] = "csv"


class PocketSource(Settings):
    """Instructions of the pocket world."""

    type: Literal["pocket"] = "pocket"
    count: int = Field(ge=1)
    seed: int = 0


Source = Annotated[
    HuggingFaceSource | JsonlSource | ParquetSource | CsvSource | PocketSource, Field(discriminator="type")
]


def label_of(source: Source) -> str:
    """Name of a source in the tables."""
    if isinstance(source, PocketSource):
        return "pocket"
    if source.label:
        return source.label
    return source.name if isinstance(source, HuggingFaceSource) else posixpath.basename(source.path)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stood in its source.

    Attributes:
        place: where it stood, as plain data (file and row, data set and row …).
        value: text, chat messages, or None where the source holds nothing.
    """

    place: dict[str, Any]
    value: str | list[dict[str, str]] | None
    task_type: str | None = None
    source: str | None = None


def read_rows(source: Source, commit: str | None = None) -> Iterator[SourceRow]:
    """All rows of a source in its order; at most a batch of them is held.

    Args:
        commit: hub commit to read instead of the newest one of `source.revision`.

    Raises:
        InputError: the source cannot be read, or a row is not what it should be.
    """
    if isinstance(source, PocketSource):
        for index, prompt in enumerate(_pocket_prompts(source)):
            yield SourceRow({"pocket": index, "seed": source.seed}, prompt.instruction, prompt.task_type)
        return
    if isinstance(source, HuggingFaceSource):
        yield from _hub_rows(source, commit)
        return
    reader = {"jsonl": _jsonl_rows, "parquet": _parquet_rows, "csv": _csv_rows}[source.type]
    for file in find_files(source.path):
        yield from reader(source, file)


def _jsonl_rows(source: _FileSource, file: File) -> Iterator[SourceRow]:
    for number, row in jsonl_records(file):
        where = f"{file.uri}: line {number}"
        _need_columns(where, row, source)
        yield _row(source, {"file": file.name, "row": number}, row, where)


def jsonl_records(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank. Raises InputError, naming file and line."""
    with file.open() as stream:
        for number, line in enumerate(_lines(file, stream), 1):
            if not line.strip():
                continue
            try:
                # A byte order mark is no JSON; editors on Windows write one.
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise InputError(f"{file.uri}: line {number} is not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(
                    f'{file.uri}: line {number} is not a JSON object; each line must be one, such as {{"prompt": "…"}}'
                )
            yield number, row


def _lines(file: File, stream: BinaryIO) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, pa.ArrowException) as error:  # a compressed file that is cut short
        raise InputError(f"{file.uri} cannot be read whole ({error}); make the file anew") from error


def _parquet_rows(source: _FileSource, file: File) -> Iterator[SourceRow]:
    with open_parquet(file) as table:
        _need_columns(file.uri, table.schema_arrow.names, source)
        _check_type(file.uri, table.schema_arrow.field(source.column))
        yield from _arrow_rows(source, parquet_batches(file, table, _wanted(source)), {"file": file.name}, file.uri)


@contextlib.contextmanager
def open_parquet(file: File) -> Iterator[pq.ParquetFile]:
    """Raises InputError, naming the file, when it is none."""
    with file.open_seekable() as stream:
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{file.uri} is cut short or is no Parquet file ({error}); check the file") from error
        yield table


def parquet_batches(file: File, table: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Raises InputError, naming the file, where its pages are damaged."""
    try:
        yield from table.iter_batches(_BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.uri} cannot be read whole ({error}); make the file anew") from error


def _csv_rows(source: _FileSource, file: File) -> Iterator[SourceRow]:
    # Only the wanted columns are converted, all as text: a number further down must not change a column's type.
    wanted = _wanted(source)
    read = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)  # with threads, errors name no row
    parse = pacsv.ParseOptions(newlines_in_values=True)
    convert = pacsv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted)
    try:
        with file.open_arrow() as stream:
            header = pacsv.open_csv(stream, read, parse).schema.names
        _need_columns(file.uri, header, source)
        with file.open_arrow() as stream:
            batches = pacsv.open_csv(stream, read, parse, convert)
            yield from _arrow_rows(source, batches, {"file": file.name}, file.uri)
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        raise InputError(f"{file.uri} is not a readable CSV file ({error}); quote texts that hold commas") from error


def _hub_rows(source: HuggingFaceSource, commit: str | None) -> Iterator[SourceRow]:
    where = hub_place(source.name, source.subset, source.split)
    data = load_hub(source.name, source.subset, source.split, commit or source.revision)
    _need_columns(where, data.column_names, source)
    _check_type(where, data.features.arrow_schema.field(source.column))
    tables = data.select_columns(_wanted(source)).with_format("arrow").iter(_BATCH_ROWS)
    place = {"dataset": source.name, "subset": source.subset, "split": source.split}
    yield from _arrow_rows(source, tables, {k: v for k, v in place.items() if v is not None}, where)


def hub_place(name: str, subset: str | None, split: str) -> str:
    """A hub data set as messages name it."""
    return f"data set {name} ({subset or 'default'}, {split})"


def load_hub(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset` of the hub, or of a local folder, at a revision.

    Raises:
        InputError: it cannot be loaded, or the cache holds another commit and the hub was not reached.
    """
    import datasets  # takes seconds to import
    import httpx

    where = hub_place(name, subset, split)
    revision = None if os.path.isdir(name) else revision
    try:
        data = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where} cannot be loaded: {reason}; check name, subset, split and revision, the network and, for gated "
            "data sets, `hf auth login`"
        ) from error
    _check_commit(data, revision, where)
    return data


def _check_commit(data: Any, commit: str | None, where: str) -> None:
    """Without a network `datasets` opens the newest version in its cache, whatever revision was asked for."""
    if commit is None or not _COMMIT.fullmatch(commit):
        return
    held = {os.path.basename(os.path.dirname(file["filename"])) for file in data.cache_files}
    if others := sorted(name for name in held if _COMMIT.fullmatch(name) and name != commit):
        raise InputError(
            f"{where}: the local cache holds commit {others[0]}, not {commit}, and the hub was not reached; "
            "run once with a network, or set `revision` to the commit that is cached"
        )


def _pocket_prompts(source: PocketSource) -> list[Any]:
    from ray_pipeline.pocket.tasks import make_prompts

    try:
        return make_prompts(source.count, source.seed)
    except ValueError as error:
        raise InputError(f"pocket source: {error}") from error


def _arrow_rows(
    source: _Columns, batches: Iterable[pa.RecordBatch | pa.Table], place: dict[str, Any], where: str
) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield _row(source, {**place, "row": number}, row, f"{where}: row {number}")


def _row(source: _Columns, place: dict[str, Any], row: dict[str, Any], where: str) -> SourceRow:
    """Check one row's prompt; other columns are taken as text, whatever they are."""
    value = row[source.column]
    if isinstance(value, str):
        texts = [value]
    elif value is not None:
        value = _messages(value, f"{where}: column {source.column!r}")
        texts = [text for message in value for text in message.values()]
    else:
        texts = []
    extra = [
        None if name is None or row.get(name) is None else str(row[name])
        for name in (source.task_type_column, source.source_column)
    ]
    if any(_HALF_CHARACTER.search(text) for text in (*texts, *filter(None, extra))):
        raise InputError(f"{where} holds half a character (a lone surrogate such as \\ud83d); mend or remove the row")
    return SourceRow(place, value, *extra)


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """A chat that ends with a user turn: answers that it came with are cut off. [] when no user turn is in it."""
    if not isinstance(value, list):
        raise InputError(f"{where} holds a {type(value).__name__}, but a prompt is text or a list of chat messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: message {position} has no role and content; rename its keys to these two")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise InputError(f"{where}: message {position} must have text as role and content")
    end = len(value)
    while end and value[end - 1]["role"].strip().lower() != "user":
        end -= 1
    return [{"role": m["role"], "content": m["content"]} for m in value[:end]]


def _wanted(source: _Columns) -> list[str]:
    names = (source.column, source.task_type_column, source.source_column)
    return list(dict.fromkeys(name for name in names if name is not None))


def _need_columns(where: str, present: Iterable[str], source: _Columns) -> None:
    present = list(present)
    for name in _wanted(source):
        if name in present:
            continue
        folded = {column.casefold(): column for column in present}
        near = [folded[c] for c in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(present) or 'none'}"
        raise InputError(f"{where} has no column {name!r}; {hint}")


def _check_type(where: str, field: pa.Field) -> None:
    """A column must be text, chat messages, or without any value (its rows are dropped as empty)."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    messages = lists and (pa.types.is_struct(kind.value_type) or pa.types.is_null(kind.value_type))
    if not (text or messages or pa.types.is_null(kind)):
        raise InputError(
            f"{where}: column {field.name!r} is {field.type}, but a prompt is text or a list of chat messages; "
            "choose another column"
        )


# --- files ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source. `name` is relative to the folder before the first wildcard, so it moves with the data."""

    folder: Folder
    name: str

    @property
    def uri(self) -> str:
        return self.folder.uri(self.name)

    def open_arrow(self, compression: str | None = "detect") -> pa.NativeFile:
        """A stream; `.gz` and `.zst` are unpacked by their names unless `compression` is None."""
        try:
            return self.folder.fs.open_input_stream(self.folder.path(self.name), compression=compression)
        except OSError as error:
            raise InputError(f"{self.uri} cannot be opened ({error}); check the path and your rights") from error

    def open_seekable(self) -> pa.NativeFile:
        try:
            return self.folder.fs.open_input_file(self.folder.path(self.name))
        except OSError as error:
            raise InputError(f"{self.uri} cannot be opened ({error}); check the path and your rights") from error

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        # BufferedReader gives lines; pyarrow's own streams have no readline.
        with self.open_arrow() as stream:
            yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), _BLOCK_BYTES))


def find_files(path: str) -> list[File]:
    """Files of a path or pattern, sorted by name. `*` and `?` stay within a folder, `**/` spans folders.

    Raises:
        InputError: there is no such file or folder, or nothing fits the pattern.
    """
    try:
        location = normalise_location(path)
        parent, name = posixpath.split(location)
        if not _WILDCARD.search(location) or (os.path.isabs(location) and os.path.exists(location)):
            return [_one_file(Folder(parent), name, path)]
        parts = location.split("/")
        first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
        folder = Folder("/".join(parts[:first]) or "/")
        fits = re.compile(_pattern("/".join(parts[first:])))
        names = sorted(name for name in _names_below(folder) if fits.fullmatch(name))
    except (OSError, pa.ArrowException, StoreError) as error:
        raise InputError(f"{path} cannot be looked up ({error}); check the path and your access to it") from error
    if not names:
        raise InputError(f"{path} matches no file; check the pattern ({folder.location} is where it looks)")
    return [File(folder, name) for name in names]


def _one_file(folder: Folder, name: str, path: str) -> File:
    kind = folder.fs.get_file_info(folder.path(name)).type
    if kind == pafs.FileType.NotFound:
        raise InputError(f"{path} does not exist (looked for {folder.uri(name)}); check the path")
    if kind == pafs.FileType.Directory:
        raise InputError(f"{path} is a folder; name its files, such as {path.rstrip('/')}/*")
    return File(folder, name)


def _names_below(folder: Folder) -> Iterator[str]:
    base = folder.path().rstrip("/") + "/"
    for info in folder.fs.get_file_info(pafs.FileSelector(folder.path(), allow_not_found=True, recursive=True)):
        if info.type == pafs.FileType.File:
            yield info.path[len(base) :]


def _pattern(glob: str) -> str:
    """Regular expression of a glob. (`fnmatch` lets * cross folders; `glob` knows only local files.)"""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", glob)
    return "".join(
        tokens.get(part) or (part.replace("[!", "[^", 1) if re.fullmatch(r"\[.+\]", part) else re.escape(part))
        for part in parts
    )


# --- digests ----------------------------------------------------------------------------------------------------------


def content_digests(source: Source) -> dict[str, str]:
    """What the source holds now: name → sha256 of each file, the commit of a hub data set, or of the pocket prompts.

    Names are relative, so that moved data keeps its fingerprint.

    Raises:
        InputError: a file is missing, or the data set's commit cannot be found out.
    """
    if isinstance(source, PocketSource):
        # The prompts themselves, so that a change of the pocket world is a change of content without a version to keep.
        prompts = [[p.instruction, p.task_type] for p in _pocket_prompts(source)]
        return {"pocket": digest(["pocket", source.count, source.seed, prompts])}
    if isinstance(source, HuggingFaceSource):
        return {source.name: _commit(source)}
    return {file.name: _sha256(file) for file in find_files(source.path)}


def _sha256(file: File) -> str:
    total = hashlib.sha256()
    with file.open_arrow(compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _commit(source: HuggingFaceSource) -> str:
    if os.path.isdir(source.name):
        folder = Folder(source.name)
        names = sorted(n for n in _names_below(folder) if not any(part.startswith(".") for part in n.split("/")))
        return digest({name: _sha256(File(folder, name)) for name in names}, size=20)
    if _COMMIT.fullmatch(source.revision or ""):
        return cast(str, source.revision)

    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        sha = HfApi().dataset_info(source.name, revision=source.revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {source.revision}" if source.revision else ""
        raise InputError(
            f"the hub has no data set {source.name}{at} that you may read; check name and revision, and for private "
            "or gated data sets run `hf auth login`"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if sha := _cached_commit(source):
            return sha
        raise InputError(
            f"the commit of data set {source.name} cannot be found out: the hub does not answer ({error}) and the "
            "local hub cache does not hold it; download it once where there is a network "
            f"(`hf download --repo-type dataset {source.name}`), or set `revision` to a full commit hash"
        ) from error
    return cast(str, sha)


def _cached_commit(source: HuggingFaceSource) -> str | None:
    """Commit that the local hub cache holds for a branch or tag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.name, repo_type="dataset"))
    with contextlib.suppress(OSError), open(os.path.join(folder, "refs", source.revision or "main")) as file:
        return file.read().strip() or None
    return None


def named_sources(sources: Sequence[Source]) -> list[tuple[str, Source]]:
    """Each source with a name that no other has: its label, numbered where two share one."""
    names: list[str] = []
    for source in sources:
        label = label_of(source)
        taken = sum(1 for n in names if n == label or n.startswith(f"{label} #"))
        names.append(label if not taken else f"{label} #{taken + 1}")
    return list(zip(names, sources, strict=True))

"""Prompts from datasets of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources.columns import TableSource, check_type, missing_column
from ray_pipeline.data.sources.files import BATCH_ROWS, File, names_below, sha256
from ray_pipeline.data.sources.source import InputError, SourceRow
from ray_pipeline.extensions import register
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubKeys(Settings):
    """Where a dataset of the Hub is."""

    type: Literal["huggingface"] = Field("huggingface", description="where the rows are: the name of the source")
    name: str = Field(description="dataset of the Hub (owner/name) or local folder")
    subset: str | None = Field(None, description="configuration of the dataset; default: its default one")
    split: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest commit of main")


@register("source", "huggingface")
class HuggingFaceSource(HubKeys, TableSource):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets.load_dataset` opens."""

    @property
    def default_label(self) -> str:
        return os.path.basename(os.path.abspath(self.name)) if os.path.isdir(self.name) else self.name

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Of a local folder the label in place of the path, as of files: a moved folder holds the same prompts."""
        if not os.path.isdir(self.name):
            return super().decisive(exclude)
        return {**super().decisive({*exclude, "name"}), "label": self.label_in_tables}

    def rows(self) -> Iterator[SourceRow]:
        where = hub_place(self.name, self.subset, self.split)
        data = load_hub(self.name, self.subset, self.split, self.revision)
        if missing := [name for name in self.columns if name not in data.column_names]:
            raise InputError(f"{where} {missing_column(missing[0], data.column_names)}")
        check_type(where, data.features.arrow_schema.field(self.column))
        tables = data.select_columns(self.columns).with_format("arrow").iter(BATCH_ROWS)
        place = {"dataset": self.default_label, "subset": self.subset, "split": self.split}
        yield from self.arrow_rows(tables, {k: v for k, v in place.items() if v is not None}, where)

    def digest(self) -> dict[str, str]:
        """The commit of the dataset; of a local folder the digest of its files."""
        return {self.default_label: _commit(self)}

    def pinned(self, digest: Mapping[str, str]) -> Self:
        """At that commit, even when somebody pushes in between."""
        return self.model_copy(update={"revision": digest[self.default_label]})


def hub_place(name: str, subset: str | None, split: str) -> str:
    """A Hub dataset as messages name it."""
    return f"dataset {name} ({subset or 'default'}, {split})"


def load_hub(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset` of the Hub, or of a local folder, at a revision.

    Raises:
        InputError: it cannot be loaded, or the cache holds another commit and the Hub did not respond.
    """
    import datasets  # takes seconds to import

    where = hub_place(name, subset, split)
    revision = None if os.path.isdir(name) else revision
    try:
        data = datasets.load_dataset(name, subset, split=split, revision=revision)
    except hub_errors(ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where} cannot be loaded: {reason}; check name, subset, split and revision, the network and, for gated "
            "datasets, `hf auth login`"
        ) from error
    _check_commit(data, revision, where)
    return data


def hub_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What a request to the Hub may raise, and `more`. The client of huggingface_hub is httpx or, in newer versions,
    httpx2; the base of all of its errors is a base of the Hub's own error too."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"), *more)


def _check_commit(data: Any, commit: str | None, where: str) -> None:
    """Without a network `datasets` opens the newest version in its cache, whatever revision was asked for."""
    if commit is None or not _COMMIT.fullmatch(commit):
        return
    held = {os.path.basename(os.path.dirname(file["filename"])) for file in data.cache_files}
    if others := sorted(name for name in held if _COMMIT.fullmatch(name) and name != commit):
        raise InputError(
            f"{where}: the local cache holds commit {others[0]}, not {commit}, and the Hub did not respond; "
            "run once with a network connection, or set `revision` to the cached commit"
        )


def _commit(source: HuggingFaceSource) -> str:
    if os.path.isdir(source.name):
        folder = Folder(source.name)
        names = sorted(n for n in names_below(folder) if not any(part.startswith(".") for part in n.split("/")))
        return digest({name: sha256(File(folder, name)) for name in names}, size=20)
    if _COMMIT.fullmatch(source.revision or ""):
        return cast(str, source.revision)

    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        sha = HfApi().dataset_info(source.name, revision=source.revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {source.revision}" if source.revision else ""
        raise InputError(
            f"no dataset {source.name}{at} on the Hub that you have access to; check name and revision, and for "
            "private or gated datasets run `hf auth login`"
        ) from error
    except hub_errors() as error:
        if sha := _cached_commit(source):
            return sha
        raise InputError(
            f"could not resolve the commit of {source.name}: the Hub did not respond ({error}) and the local Hub "
            "cache does not have it; download it once with a network connection "
            f"(`hf download --repo-type dataset {source.name}`), or set `revision` to a full commit hash"
        ) from error
    return cast(str, sha)


def _cached_commit(source: HuggingFaceSource) -> str | None:
    """Commit that the local Hub cache holds for a branch or tag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.name, repo_type="dataset"))
    with contextlib.suppress(OSError), open(os.path.join(folder, "refs", source.revision or "main")) as file:
        return file.read().strip() or None
    return None

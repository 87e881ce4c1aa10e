"""The protocol of a prompt source, and what one row of it is."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.extensions import find


class InputError(ValueError):
    """A source of prompts cannot be used; the message names the file, the column or row, and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stood in its source.

    Attributes:
        place: where it stood, as plain data (file and row, dataset and row, …).
        value: text, chat messages, or None where the source holds nothing.
        task_type: kind of task; None is "general".
        source: where the row is from, if not the source's label.
        system: system message for a row that brings none of its own.
        fault: what is wrong with the row, and where it stands; the row is dropped and counted.
    """

    place: dict[str, Any]
    value: str | list[dict[str, str]] | None
    task_type: str | None = None
    source: str | None = None
    system: str | None = None
    fault: str | None = None


class PromptSource(Settings, abc.ABC):
    """One entry of `prompts.sources`. Subclass it, register the subclass under the kind `source`, and its fields become
    the keys of the entry.
    """

    type: str = Field(description="name of the source, or the file that registers it")

    @abc.abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """All rows in the order of the source, as a stream.

        Raises:
            InputError: the source cannot be read. A bad row does not end the load: it comes with a `fault`.
        """

    @abc.abstractmethod
    def digest(self) -> dict[str, str]:
        """Content of the source now: name of a part → digest or commit. It decides whether a stored run is up to date,
        together with the keys and, for a user's source, its file.

        Names are relative, so that moved data keeps its fingerprint.

        Raises:
            InputError: the source cannot be found.
        """

    def pinned(self, digest: Mapping[str, str]) -> Self:
        """The source at exactly the content that `digest()` returned, where that can be chosen; else the source."""
        return self

    @property
    def label_in_tables(self) -> str:
        """Name of the source in the tables: the key `label`, if the source has one and it is set, else the default."""
        return getattr(self, "label", None) or self.default_label

    @property
    def default_label(self) -> str:
        """Label where none is set: the type, or the stem of its file."""
        return os.path.basename(self.type).split(".py")[0]

    @property
    def cap(self) -> int | None:
        """Maximum number of distinct prompts (smallest hashes kept): the key `limit`, if the source has one."""
        return getattr(self, "limit", None)

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Always with the type, which may be a default in a user's class."""
        return {**super().decisive(exclude), "type": self.type}

    def __reduce__(self) -> Any:
        # By reference and values: a class of a user's file is found again by whoever reads it.
        return source_from, (self.model_dump(exclude_unset=True) | {"type": self.type},)


def source_from(values: Any) -> PromptSource:
    """The source that an entry of `prompts.sources` describes, by its `type`.

    Raises:
        ExtensionError, a ValueError: there is no source of that type.
        ValidationError: its keys do not fit.
    """
    if isinstance(values, PromptSource):
        return values
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise ValueError("a source is a mapping with the key type, such as {type: jsonl, path: …, column: …}")
    source: PromptSource = find("source", values["type"]).value.model_validate(dict(values))
    return source

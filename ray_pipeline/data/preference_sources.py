"""Preference data made elsewhere: Hub datasets and files in TRL's standard formats.

    paired          prompt, chosen, rejected       (prompt may be inside chosen and rejected, as whole conversations)
    unpaired        prompt, completion, label      (label: true or false)
    demonstrations  prompt, completion; or messages

Texts are strings or chat messages in any form of `sources/chats.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import FileTable, HubTable, InputError, Record
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.sources.records import AnswerTable, Choose
from ray_pipeline.store.keys import digest

Format = Literal["paired", "unpaired", "demonstrations"]


class _Rows(Settings):
    """Keys of every source. Columns have TRL's names by default."""

    format: Format = Field("paired", description="layout of the rows: paired, unpaired or demonstrations")
    prompt: str = Field("prompt", description="column with the prompt")
    chosen: str = Field("chosen", description="column with the better answer")
    rejected: str = Field("rejected", description="column with the worse answer")
    completion: str = Field("completion", description="column with the answer")
    label: str = Field("label", description="column with the label: whether the answer is desirable")
    messages: str = Field("messages", description="column with the whole chat")
    chosen_score: str | None = Field(
        None, description="columns with scores of a pair, if it has some; a gap of 0 or less drops the pair"
    )
    rejected_score: str | None = Field(
        None, description="columns with scores of a pair, if it has some; a gap of 0 or less drops the pair"
    )
    finish_reason: str | None = Field(
        None,
        description="column with why the generation of the answer of an unpaired row or a demonstration ended: stop, "
        "length, content_filter, …; a row whose answer was cut off is left out; default: `finish_reason`, if there is "
        "one, or that of the answer's message",
    )
    limit: int | None = Field(None, ge=1, description="maximum number of rows (the first ones are kept)")
    license: str = Field("other", description="for the dataset card, as the Hub spells it")

    @model_validator(mode="after")
    def _of_one_answer(self) -> Self:
        if self.finish_reason is not None and self.format == "paired":
            raise ValueError(
                "finish_reason names a column about one answer, and a paired row has two; remove the key, and put "
                "`finish_reason` into the messages of the answers"
            )
        return self

    @property
    def finish_column(self) -> str:
        """The column that is looked for in rows of one answer."""
        return self.finish_reason or "finish_reason"


class HubPreferences(_Rows, HubTable):
    """A dataset of the Hugging Face Hub, such as HuggingFaceH4/ultrafeedback_binarized (split train_prefs)."""


class FilePreferences(_Rows, FileTable):
    """Parquet, JSON (one object a line, or an array) or CSV files: a path or URI, which may hold *, ** and ?."""


class PocketPreferences(_Rows, AnswerTable):
    """A right and a wrong answer to each instruction of the pocket world."""

    type: Literal["pocket"] = Field("pocket", description="where the rows are: the name of the source")
    count: int = Field(ge=1, description="number of distinct prompts")
    seed: int = Field(0, description="seed of the prompts")

    @property
    def place(self) -> str:
        """The table as messages name it."""
        return f"{self.count} pairs of the pocket world"

    @property
    def default_label(self) -> str:
        return "pocket"

    @property
    def moves(self) -> set[str]:
        """Keys that a moved copy of the same content has other values of."""
        return set()

    def digests(self) -> dict[str, str]:
        """Digest of the pairs, so that a change of the pocket world is a change of content."""
        return {"pocket": digest(["pairs", self._pairs()])}

    def records(self, choose: Choose, digests: dict[str, str] | None = None) -> Iterator[Record]:
        """The pairs in the columns `prompt`, `chosen` and `rejected`."""
        for number, pair in enumerate(self._pairs(), 1):
            sides = ("response_a", "response_b") if pair["human_label"] == "A" else ("response_b", "response_a")
            row = {"prompt": pair["question"], "chosen": pair[sides[0]], "rejected": pair[sides[1]]}
            yield Record(f"{self.place}: row {number}", number, {name: row[name] for name in choose(row, True)})

    def _pairs(self) -> list[dict[str, Any]]:
        from ray_pipeline.pocket.pairs import make_pairs

        try:
            return make_pairs(self.count, self.seed)
        except ValueError as error:
            raise InputError(f"pocket preferences: {error}") from error


PreferenceSource = Annotated[HubPreferences | FilePreferences | PocketPreferences, Field(discriminator="type")]


def source_records(source: PreferenceSource, digests: dict[str, str] | None = None) -> Iterator[Record]:
    """The rows, with the columns that the format needs; a row without one of them has a fault.

    Args:
        digests: what `source.digests` returned: a Hub dataset is read at exactly that commit.

    Raises:
        InputError: the source cannot be read, or a column is missing from all rows of a file or dataset.
    """
    return itertools.islice(source.records(functools.partial(_columns, source), digests), source.limit)


def _columns(source: PreferenceSource, present: Collection[str], whole: bool) -> list[str]:
    """The columns to read from a row, or from all rows. Raises BadRow where one is missing that is needed."""
    needed = {
        "paired": [source.chosen, source.rejected],
        "unpaired": [source.prompt, source.completion, source.label],
        "demonstrations": [source.messages] if source.messages in present else [source.prompt, source.completion],
    }[source.format]
    scores = [name for name in (source.chosen_score, source.rejected_score) if name is not None]
    named = [*scores, *([source.finish_reason] if source.finish_reason is not None else [])]
    _need(source, [*needed, *named] if whole else needed, present)
    more = source.prompt if source.format == "paired" else source.finish_column
    return [*dict.fromkeys([*needed, *scores, *([more] if more in present else [])])]


def _need(source: PreferenceSource, names: Sequence[str], present: Collection[str]) -> None:
    missing = [name for name in names if name not in present]
    if missing:
        raise BadRow(
            f"has no column {missing[0]!r}, which {source.format} rows need; it has "
            f"{', '.join(present) or 'none'}. Set the right one in the source, or choose another format"
        )

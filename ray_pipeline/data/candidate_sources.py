"""The user's own completions: which tables hold them, in which columns, and what one row holds.

    responses        prompt, and a list: texts, messages, or objects such as UltraFeedback's {"model", "response", …}
    chosen, rejected prompt (in its own column or inside both), and two answers
    response         prompt, and one answer; the rows of a prompt are its candidates

Prompts and answers are texts or chat messages in any form of `sources/chats.py`. The prompts of a run are those of the
same rows: `CandidatePrompts` is the prompt source that reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import FileTable, HubTable, InputError, PromptSource, Record, SourceRow
from ray_pipeline.data.sources.answers import Drop, chat_in_text, finish_reason_of, split_answer
from ray_pipeline.data.sources.chats import BadRow, messages_of
from ray_pipeline.data.sources.columns import meta_of
from ray_pipeline.data.sources.records import Thoughts
from ray_pipeline.store.keys import normalise_messages, normalise_text, prompt_id
from ray_pipeline.store.outside import json_value

#: What a row holds → the keys that name its columns.
_LAYOUTS = {"responses": ("responses",), "pair": ("chosen", "rejected"), "response": ("response",)}
#: Key → the columns that are looked for where the key is not set.
_USUAL = {
    "prompt": ("prompt", "instruction"),
    "responses": ("responses", "completions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "response": ("response", "completion"),
    "model": ("model",),
    "finish_reason": ("finish_reason",),
    "chosen_model": ("chosen_model",),
    "rejected_model": ("rejected_model",),
}
#: Where an object of a list has its answer; the first that it has counts.
_TEXT_KEYS = ("response", "completion", "content", "text")


class _Completions(Settings):
    """Columns, and how much is read."""

    prompt: str | None = Field(None, description="column with the prompt; default: `prompt` or `instruction`")
    responses: str | None = Field(
        None,
        description="column with a list of answers: texts, messages, or objects with `response` and `model`; default: "
        "`responses` or `completions`, if there is one",
    )
    chosen: str | None = Field(None, description="columns with two answers; default: `chosen` and `rejected`")
    rejected: str | None = Field(None, description="columns with two answers; default: `chosen` and `rejected`")
    response: str | None = Field(
        None, description="column with one answer, a row for each; default: `response` or `completion`"
    )
    model: str | None = Field(
        None, description="column with the model that gave `response` (or a list of those of `responses`)"
    )
    finish_reason: str | None = Field(
        None,
        description="column with why the generation of `response` ended (or a list for those of `responses`): stop, "
        "length, content_filter, …; default: `finish_reason`, if there is one",
    )
    chosen_model: str | None = Field(None, description="columns with the models that gave the two answers")
    rejected_model: str | None = Field(None, description="columns with the models that gave the two answers")
    meta_columns: tuple[str, ...] = Field(
        (), description="columns that are kept in the prompt's `meta` for checkers, of the first row of a prompt"
    )
    label: str | None = Field(
        None, description="name of the source in the tables; default: the name of the dataset or file"
    )
    license: str | None = Field(None, description="licence of the rows, for the dataset card; default: unknown")
    limit: int | None = Field(None, ge=1, description="maximum number of distinct prompts (smallest hashes kept)")

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        chosen = [keys for keys in _LAYOUTS.values() if any(getattr(self, key) is not None for key in keys)]
        if len(chosen) > 1:
            raise ValueError(
                f"{chosen[0][0]} and {chosen[1][0]} name answers in two layouts; set `responses`, or `chosen` and "
                "`rejected`, or `response`"
            )
        return self


class HubCandidates(_Completions, HubTable):
    """A dataset of the Hugging Face Hub, such as openbmb/UltraFeedback, or a local folder of one."""

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        return _moved(self, super().decisive({*exclude, "license", *self.moves}))


class FileCandidates(_Completions, FileTable):
    """Parquet, JSON (one object a line, or an array) or CSV files: a path or URI, which may hold *, ** and ?."""

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        return _moved(self, super().decisive({*exclude, "license", *self.moves}))


CandidateSource = Annotated[HubCandidates | FileCandidates, Field(discriminator="type")]


def _moved(source: CandidateSource, decisive: dict[str, Any]) -> dict[str, Any]:
    """The label in place of a path: files that were moved hold the same completions, and contents have digests."""
    return {**decisive, "label": label_of(source)} if source.moves else decisive


def label_of(source: CandidateSource) -> str:
    return source.label or source.default_label


@dataclasses.dataclass(frozen=True, slots=True)
class OwnAnswer:
    """One answer of a row.

    Attributes:
        model: who gave it, as the row says; None where it does not.
        label: `chosen` or `rejected` where the row prefers one of two.
        thoughts: what was split off the text.
        finish_reason: why its generation ended, `unknown` where the row does not say.
    """

    text: str
    model: str | None = None
    label: Literal["chosen", "rejected"] | None = None
    thoughts: str | None = None
    finish_reason: str = "unknown"


@dataclasses.dataclass(frozen=True, slots=True)
class OwnRow:
    """What one row holds.

    Attributes:
        number: of the row, see `Record`.
        messages: the prompt; [] where there is none, or a `fault`.
        empty: answers without any text, which are not among `answers`.
        unfinished: answers that end within their thoughts, which are not among `answers` either.
        fault: what is wrong with the row, and where it stands.
        meta: values of the source's `meta_columns`.
    """

    number: int
    messages: list[dict[str, str]]
    answers: Sequence[OwnAnswer] = ()
    empty: int = 0
    unfinished: int = 0
    fault: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def own_rows(source: CandidateSource, digests: dict[str, str] | None = None) -> Iterator[OwnRow]:
    """All rows in the order of the source, as a stream.

    Args:
        digests: what `source.digests` returned: a Hub dataset is read at exactly that commit.

    Raises:
        InputError: the source cannot be read, or all rows lack a column. A bad row has a `fault`.
    """

    def choose(present: Collection[str], whole: bool) -> list[str]:
        found = _columns(source, present, whole).values()
        return list(dict.fromkeys([*found, *(name for name in source.meta_columns if name in present)]))

    for record in source.records(choose, digests):
        try:
            if record.fault:
                raise BadRow(record.fault)
            row = _row(record, _columns(source, record.row, whole=False), source.thoughts)
            yield (
                dataclasses.replace(row, meta=meta_of(record.row, source.meta_columns)) if source.meta_columns else row
            )
        except BadRow as fault:
            between = " " if record.fault or str(fault).startswith("has ") else ": "
            yield OwnRow(record.number, [], fault=f"{record.where}{between}{fault}")


def _columns(source: CandidateSource, present: Collection[str], whole: bool) -> dict[str, str]:
    """Key → the column that it names, of those that are there. Raises BadRow where one is missing that is needed."""
    found: dict[str, str] = {}
    for key, usual in _USUAL.items():
        named = getattr(source, key)
        column = next((name for name in ([named] if named else usual) if name in present), None)
        if column is not None:
            found[key] = column
    named = [name for name, keys in _LAYOUTS.items() if any(getattr(source, key) for key in keys)]
    layout = next((n for n in named or _LAYOUTS if all(key in found for key in _LAYOUTS[n])), None)
    has = f"it has {', '.join(present) or 'none'}"
    if layout is None:
        keys = [key for name in named or _LAYOUTS for key in _LAYOUTS[name] if key not in found]
        absent = [getattr(source, key) or key for key in keys]
        what = f"no column {absent[0]!r}" if named else "no column of answers"
        raise BadRow(f"has {what}; {has}. Set candidates.source.{' or '.join(keys)} to the right one")
    if "prompt" not in found and layout != "pair":
        raise BadRow(
            f"has no column {source.prompt or 'prompt'!r}; {has}. Set candidates.source.prompt to the right one"
        )
    for key in ("prompt", "model", "finish_reason", "chosen_model", "rejected_model"):
        if whole and getattr(source, key) and key not in found:
            raise BadRow(f"has no column {getattr(source, key)!r}; {has}. Correct or remove candidates.source.{key}")
    if whole and (absent := [name for name in source.meta_columns if name not in present]):
        raise BadRow(f"has no column {absent[0]!r}; {has}. Correct candidates.source.meta_columns")
    extra = ("chosen_model", "rejected_model") if layout == "pair" else ("model", "finish_reason")
    return {key: column for key, column in found.items() if key in ("prompt", *_LAYOUTS[layout], *extra)}


def _row(record: Record, columns: Mapping[str, str], thoughts: Thoughts) -> OwnRow:
    row = record.row
    prompt = row[columns["prompt"]] if "prompt" in columns else None
    if prompt is not None or "chosen" not in columns:
        try:
            messages = messages_of(prompt or "")
        except BadRow as fault:
            raise BadRow(f"column {columns['prompt']!r}: {fault}") from fault
        if not messages or not normalise_text(messages[-1]["content"]):
            return OwnRow(record.number, [])
    found: list[dict[str, str]] | None = None
    answers: list[OwnAnswer] = []
    empty = unfinished = 0
    for column, value, model, label, ended in _values(row, columns):
        if value is None or value == "" or value == []:
            empty += 1
            continue
        try:
            messages, text, apart = split_answer(prompt, value, (columns.get("prompt", "prompt"), column), thoughts)
        except Drop as reason:
            if str(reason) == "not_an_answer":
                raise BadRow(f"column {column!r}: a chat must end with the answer, a prompt must not") from reason
            unfinished += str(reason) == "unfinished_thought"
            empty += str(reason) != "unfinished_thought"
            continue
        if found is not None and found != messages and normalise_messages(found) != normalise_messages(messages):
            raise BadRow("its answers belong to different prompts; give each prompt a row of its own")
        found = found or messages
        answers.append(OwnAnswer(text, None if model is None else str(model), label, apart, ended))
    return OwnRow(record.number, found or [], answers, empty, unfinished)


def _values(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any, Literal["chosen", "rejected"] | None, str]]:
    """Column, answer, model and label of each answer of a row, as they stand, and its finish reason."""
    if "chosen" in columns:
        sides: tuple[Literal["chosen"], Literal["rejected"]] = ("chosen", "rejected")
        chats = {side: chat_in_text(row[columns[side]]) for side in sides}
        for side in sides:  # one of two texts may happen to look like a chat; two that do are columns of chats
            named = columns.get(f"{side}_model")
            value = chats[side] if all(chats.values()) else row[columns[side]]
            yield columns[side], value, row[named] if named else None, side, finish_reason_of(value)
        return
    beside = {key: row[columns[key]] if key in columns else None for key in ("model", "finish_reason")}
    if "response" in columns:
        value = row[columns["response"]]
        yield columns["response"], value, beside["model"], None, finish_reason_of(value, beside["finish_reason"])
        return
    column = columns["responses"]
    values = _listed(column, row[column])
    models, ends = (_one_each(value, len(values)) for value in beside.values())
    for value, named, ended in zip(values, models, ends, strict=True):
        if isinstance(value, Mapping):
            key = next((key for key in _TEXT_KEYS if key in value), None)
            if key is None:
                raise BadRow(f"column {column!r}: an answer has no `response`; it has {', '.join(value) or 'nothing'}")
            yield column, value[key], value.get("model", named), None, finish_reason_of(value, ended)
        else:
            yield column, value, named, None, finish_reason_of(value, ended)


def _one_each(value: Any, count: int) -> list[Any]:
    """A list of one value for each answer; None for all where a list has another length."""
    if not isinstance(value, list):
        return [value] * count
    return value if len(value) == count else [None] * count


def _listed(column: str, value: Any) -> list[Any]:
    """A list, which a CSV cell holds as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json_value(value)
        except ValueError as error:
            raise BadRow(f"column {column!r} must be a list, and its text is not JSON ({error})") from error
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise BadRow(f"column {column!r} must be a list of answers, not {type(value).__name__}")
    return value


class CandidatePrompts(PromptSource):
    """The prompts of the user's own completions, each once."""

    type: Literal["candidates"] = Field("candidates", description="where the rows are: the name of the source")
    source: CandidateSource = Field(description="as in `candidates.source`")

    @property
    def default_label(self) -> str:
        return label_of(self.source)

    @property
    def cap(self) -> int | None:
        return self.source.limit

    def digest(self) -> dict[str, str]:
        return self.source.digests()

    def pinned(self, digest: Mapping[str, str]) -> Self:
        return self.model_copy(update={"source": self.source.model_copy(update=_pin(self.source, digest))})

    def __reduce__(self) -> Any:
        # It is in no registry, where sources are found again otherwise: users name it by `candidates.source`.
        return type(self).model_validate, ({"source": self.source.model_dump()},)

    def rows(self) -> Iterator[SourceRow]:
        seen: set[str] = set()
        read = 0
        first: str | None = None
        for row in own_rows(self.source):
            read += 1
            place = {"source": self.default_label, "row": row.number}
            first = first or row.fault
            if row.fault or not row.answers:
                yield SourceRow(place, None, fault=row.fault)
            elif (name := prompt_id(row.messages)) not in seen:
                seen.add(name)
                yield SourceRow({**row.meta, **place}, row.messages)
        where = f"candidates.source: {self.source.place}"
        if not read:
            raise InputError(f"{where} has no rows; check that it was written")
        if not seen:
            raise InputError(f"{where}: none of {read} rows has a prompt and an answer. {first or 'All are empty.'}")


def _pin(source: CandidateSource, digest: Mapping[str, str]) -> dict[str, Any]:
    hub = isinstance(source, HubCandidates) and not source.moves
    return {"revision": digest[source.default_label]} if hub else {}

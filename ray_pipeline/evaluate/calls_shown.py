"""The calls about the candidates of a page, from the call log: the messages sent, and the replies as they came.

The log keeps a call under its prompt and role, not under a candidate. The calls of a judge about the candidates of a
prompt differ only in the response, so what all of them have before and after it identifies the response in a call.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.engines.log_rows import completion_of
from ray_pipeline.engines.thoughts import answered
from ray_pipeline.store.calls import read_part
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Maximum number of rows of the log that are read for a page: a log can be shared by many runs.
MOST_ROWS = 400_000
#: A response of so many characters is recognised wherever it is in a message.
_DISTINCT = 40
#: Maximum number of calls of a candidate.
_MOST_CALLS = 16
_MOST_BYTES = 256 << 20  # of texts of the log in memory
_ROLE = "\0"  # in no stored text

Row = dict[str, Any]


class Reply(NamedTuple):
    """`answer` is the text without thoughts."""

    text: str
    finish_reason: str
    reasoning: str | None
    answer: str


class Call(NamedTuple):
    """A question and all replies to it: an unreadable reply is asked for again."""

    role: str
    messages: Sequence[tuple[str, str]]
    replies: Sequence[Reply]


class Calls(NamedTuple):
    """`of` has the calls by candidate; `missing` is a sentence on why some are not there, "" if all are."""

    of: Mapping[str, Sequence[Call]]
    missing: str


def calls_about(
    root: Folder,
    responses: Mapping[str, Mapping[str, str]],
    shown: Collection[str],
    raw: Mapping[tuple[str, str], str] | None = None,
    most_rows: int = MOST_ROWS,
) -> Calls:
    """The logged calls about some candidates.

    Args:
        root: folder of the call log.
        responses: prompt → candidate → response, for all candidates of every prompt of `shown`.
        shown: candidates whose calls are looked for.
        raw: (candidate, role) → the reply that counts. The log also has the calls of rubrics and texts that the run had
            before; where one call has this reply, only such calls are shown.
    """
    rows, whole = _rows(root, responses, most_rows)
    if not rows:
        why = "has no calls of these candidates" if root.folders() else "is gone"
        return Calls({}, f"The call log {why}, so the messages that were sent are not shown.")
    groups: dict[tuple[str, str], dict[str, list[Row]]] = collections.defaultdict(dict)
    for row in rows:
        groups[row["prompt_id"], row["role"]].setdefault(_text(row), []).append(row)
    found: dict[str, list[Call]] = collections.defaultdict(list)
    for (prompt, role), by_text in sorted(groups.items()):
        for name, call in _assigned(role, by_text, responses[prompt]):
            if name in shown:
                found[name].append(call)
    found = {name: list(_that_count(name, calls, raw or {}))[:_MOST_CALLS] for name, calls in found.items()}
    return Calls(found, "" if whole else "The call log is too large or damaged, so some calls are missing.")


def _that_count(name: str, calls: Sequence[Call], raw: Mapping[tuple[str, str], str]) -> Iterable[Call]:
    def counts(call: Call) -> bool:
        return any(reply.answer == raw.get((name, call.role)) for reply in call.replies)

    known = {call.role for call in calls if counts(call)}
    return (call for call in calls if call.role not in known or counts(call))


def _rows(root: Folder, prompts: Collection[str], most_rows: int) -> tuple[list[Row], bool]:
    """Rows of the log about these prompts, each call once; and whether the whole log was read."""
    wanted, read, size = pa.array(prompts, pa.string()), 0, 0
    found: dict[str, Row] = {}
    whole = True
    parts = sorted((part, model) for model in root.folders() for part in (root / model).names(".parquet"))
    for part, model in parts:
        if read >= most_rows or size >= _MOST_BYTES:
            whole = False
            break
        try:
            table = read_part(root / model, part)
        except (StoreError, OSError):
            whole = False
            continue
        read += len(table)
        about = pc.or_(pc.starts_with(table["role"], "judge/"), pc.equal(table["role"], "critic"))
        about = pc.or_(about, pc.or_(pc.equal(table["role"], "candidate"), pc.starts_with(table["role"], "generate")))
        table = table.filter(pc.and_(about, pc.is_in(table["prompt_id"], wanted)))
        size += table.nbytes
        for row in table.to_pylist():
            found.setdefault(row["call_key"], row)
    return sorted(found.values(), key=lambda row: (row["sampling"], row["call_key"])), whole


def _text(row: Row) -> str:
    return _ROLE.join(f"{message['role']}{_ROLE}{message['content']}" for message in row["messages"])


def _assigned(role: str, by_text: Mapping[str, list[Row]], responses: Mapping[str, str]) -> Iterable[tuple[str, Call]]:
    """(candidate, call) of the calls about a prompt in one role."""
    if role == "candidate" or role.startswith("generate"):
        for rows in by_text.values():
            for row in rows:
                reply = completion_of(row)
                texts = {reply.text, answered(reply).text}
                for name in (name for name, response in responses.items() if response in texts):
                    yield name, _call([row])
        return
    place = _place(by_text, responses)
    for text, rows in by_text.items():
        of_place = [name for name, response in responses.items() if place and _fits(text, response, *place)]
        every = [name for name, response in responses.items() if response in text]
        if not of_place:  # a comparison shows all responses; else only a long text shows where it is from
            of_place = every if len(every) == len(responses) else [n for n in every if len(responses[n]) >= _DISTINCT]
        for name in of_place:
            yield name, _call(rows)


def _place(texts: Collection[str], responses: Mapping[str, str]) -> tuple[int, int] | None:
    """(characters before the response, characters after it) of all these texts; None where they have no such place.

    Several places are possible where few texts are known. The one that explains most texts is taken, by the longest
    responses.
    """
    before, after = _shared(texts), _shared([text[::-1] for text in texts])
    explained: dict[tuple[int, int], dict[str, int]] = collections.defaultdict(dict)
    for text in texts:
        for response in set(responses.values()):
            start = text.find(response) if response else -1
            while 0 <= start <= before:
                rest = len(text) - start - len(response)
                if rest <= after:
                    fits = explained[start, rest]
                    fits[text] = max(fits.get(text, 0), len(response))
                start = text.find(response, start + 1)
    return max(explained, key=lambda place: (len(explained[place]), sum(explained[place].values())), default=None)


def _shared(texts: Collection[str]) -> int:
    """Length of the longest common beginning."""
    first, last = min(texts), max(texts)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _fits(text: str, response: str, before: int, after: int) -> bool:
    return len(text) == before + len(response) + after and text.startswith(response, before)


def _call(rows: Sequence[Row]) -> Call:
    messages = [(message["role"], message["content"]) for message in rows[0]["messages"]]
    return Call(rows[0]["role"], messages, [_reply(row) for row in rows])


def _reply(row: Row) -> Reply:
    return Reply(row["text"], row["finish_reason"], row["reasoning"], answered(completion_of(row)).text)

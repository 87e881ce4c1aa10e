"""Checklists: requirements that a judge ticks one by one. Their settings, the forms of replies, and how these are read.

A checklist is given (`judge.rubrics[].items`) or written by a model for each prompt (`judge.rubrics[].checklist`). One
reply ticks all items of an answer. It is read as a whole: every item has exactly one tick, or there is no verdict.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, field_validator

from ray_pipeline.agents.replies import Read, object_grammar
from ray_pipeline.agents.verdict_styles import Wanted
from ray_pipeline.agents.verdicts import Unread, find_verdict
from ray_pipeline.config.settings import NewTokens, Settings, Temperature
from ray_pipeline.engines.base import Completion, Grammar

#: Longest text of an item in characters, and most items of a list: one reply must have room for the ticks of all.
ITEM_CHARS = 300
MOST_ITEMS = 50


class ChecklistItem(Settings):
    """One requirement of a checklist."""

    text: str = Field(description="requirement, to be answered with yes or no")
    weight: float = Field(1.0, gt=0, description="share of the score, relative to the other items")

    @field_validator("text")
    @classmethod
    def _one_line(cls, text: str) -> str:
        text = " ".join(text.split())
        if not text:
            raise ValueError("an item of a checklist is empty; write the requirement, or remove the item")
        if len(text) > ITEM_CHARS:
            raise ValueError(f"an item of a checklist has {len(text)} characters, at most {ITEM_CHARS} are possible")
        return text


#: An item, or its text alone.
Item = Annotated[ChecklistItem, BeforeValidator(lambda item: {"text": item} if isinstance(item, str) else item)]


class ChecklistSettings(Settings):
    """Who writes the items of a checklist for each prompt."""

    model: str = Field(description="a key of `models`: it reads a prompt and writes the items, in one call")
    most: int = Field(8, ge=1, le=MOST_ITEMS, description="maximum number of items of a prompt")
    temperature: Temperature = Field(0.0, description="0 is greedy")
    max_tokens: NewTokens = Field(1024, description="maximum number of new tokens of a list")
    edited: str | None = Field(
        None,
        description="JSON lines with `prompt_id` and `items` that replace the written items of these prompts; an item "
        "is a text, or `text` and `weight`",
    )

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Nothing: verdicts depend on the items, which are an input of the judge's stage."""
        return {}


# --- writing items ----------------------------------------------------------------------------------------------------


def items_grammar(most: int) -> Grammar:
    """`{"items": [text, …]}`."""
    text = {"type": "string", "minLength": 1, "maxLength": ITEM_CHARS}
    return object_grammar(0, items={"type": "array", "items": text, "minItems": 1, "maxItems": most})


def items_verdict(reply: Completion, most: int) -> Read | Unread:
    """`items`: 1 to `most` texts, equal ones once; a list with anything else in it is unread."""
    return _whole(reply, "items", lambda fields: _texts(fields["items"], most))


def _texts(value: Any, most: int) -> dict[str, Any] | None:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return None
    texts = {text.casefold(): text for text in reversed([" ".join(text.split()) for text in value])}
    found = list(reversed(texts.values()))
    if not 1 <= len(found) <= most or any(not text or len(text) > ITEM_CHARS for text in found):
        return None
    return {"items": found}


# --- ticking them -----------------------------------------------------------------------------------------------------


class Tick(NamedTuple):
    """Whether an answer meets an item, and what in the answer shows it."""

    met: bool
    evidence: str | None = None


def ticks_form(count: int, reason_chars: int) -> str:
    """The JSON object that a reply has to be, as a prompt shows it."""
    fields = [*(['"evidence_{0}": "..."'] if reason_chars else []), '"met_{0}": true|false']
    shown = [", ".join(fields).format(number) for number in range(1, count + 1)]
    return "{" + ", ".join(shown if count < 4 else [shown[0], shown[1], "...", shown[-1]]) + "}"


def ticks_grammar(count: int, reason_chars: int) -> Grammar:
    """`{"evidence_1": …, "met_1": …, …}`, an item after the other; `reason_chars` 0 leaves out the evidence."""
    fields: dict[str, dict[str, Any]] = {}
    for number in range(1, count + 1):
        if reason_chars:
            fields[f"evidence_{number}"] = {"type": "string", "maxLength": reason_chars}
        fields[f"met_{number}"] = {"type": "boolean"}
    return object_grammar(0, **fields)


def ticks_verdict(reply: Completion, count: int) -> Read | Unread:
    """`ticks` of items 1 to `count`; unread unless the reply has exactly one for each and none for others."""
    return _whole(reply, "met_1", functools.partial(_ticks, count=count))


_MET = re.compile(r"\s*met_([0-9]{1,4})\s*", re.IGNORECASE)
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def _ticks(fields: Mapping[str, Any], count: int) -> dict[str, Any] | None:
    said = [(int(match[1]), value) for name, value in fields.items() if (match := _MET.fullmatch(name))]
    if sorted(number for number, _ in said) != list(range(1, count + 1)):
        return None
    ticks = {}
    for number, value in said:
        met = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(met, bool):
            return None
        evidence = fields.get(f"evidence_{number}")
        ticks[number] = Tick(met, evidence.strip() or None if isinstance(evidence, str) else None)
    return {"ticks": [ticks[number] for number in range(1, count + 1)]}


def _whole(reply: Completion, key: str, read: Any) -> Read | Unread:
    """What `read` makes of the one object with `key` that a reply has."""
    found = find_verdict(reply, Wanted({"": key}, "fields", whole=read))
    if isinstance(found, Unread):
        return found
    return Read("ok" if found.whole else "repaired", {"reason": found.said, **found.values[""]})


def stored_ticks(raw: str | None, count: int) -> list[Tick] | None:
    """The ticks of a reply as verdicts keep it (column `raw`); None where it has none."""
    read = ticks_verdict(Completion(raw or "", "stop", 0, 0, 0), count)
    return None if isinstance(read, Unread) else read.fields["ticks"]


def weighted_share(items: Sequence[ChecklistItem], ticks: Sequence[Tick]) -> float:
    """Weight of the items that are met over that of all, from 0 to 1."""
    met = sum(item.weight for item, tick in zip(items, ticks, strict=True) if tick.met)
    return met / sum(item.weight for item in items)


def ticks_reason(items: Sequence[ChecklistItem], ticks: Sequence[Tick]) -> str:
    """What is met and what is not, in words: the reason of a verdict."""
    missed = [
        f"{item.text}{f' ({tick.evidence})' if tick.evidence else ''}"
        for item, tick in zip(items, ticks, strict=True)
        if not tick.met
    ]
    count = f"{len(ticks) - len(missed)} of {len(ticks)} items are met"
    return f"{count}; not met: {'; '.join(missed)}" if missed else count

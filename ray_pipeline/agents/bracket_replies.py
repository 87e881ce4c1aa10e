"""Replies that end with a verdict in brackets, as MT-Bench's judges are asked for: `[[7]]`, `[[A]]`.

The rule of reading is part of a benchmark's protocol, so the published one is here as it is, next to the one that this
project prefers. Only the judge's own reply is read; it may quote the text that it judges, and with it a verdict.
"""

from __future__ import annotations

import re
from typing import Literal

from ray_pipeline.agents.replies import Read
from ray_pipeline.engines.base import Completion

#: published: the first rating in double brackets, else the first number in single ones; of the choices A before B
#: before C, wherever they stand (FastChat, llm_judge/common.py).
#: unanimous: the same, but a reply that holds two different verdicts has none. Where no reply does, both read alike.
Reading = Literal["published", "unanimous"]

_RATING, _LOOSE_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
_CHOICE = re.compile(r"\[\[([ABC])\]\]")


def read_rating(reply: Completion, reading: Reading, low: float, high: float) -> Read | None:
    """`score`, a number in [low, high], or None. A number in single brackets is `repaired`.

    A reply that was cut off is read too, where its verdict stands before the end, as the published rule does.
    """
    values, loose = _ratings(reply.text)
    if not values or not low <= values[0] <= high or (reading == "unanimous" and len(set(values)) > 1):
        return None
    return Read("repaired" if loose else "ok", {"score": values[0]})


def read_bracketed_choice(reply: Completion, reading: Reading) -> Read | None:
    """`choice`, which is A, B or C (tie), or None."""
    found = set(_CHOICE.findall(reply.text))
    if not found or (reading == "unanimous" and len(found) > 1):
        return None
    return Read("ok", {"choice": min(found)})


def contradicts_itself(text: str) -> bool:
    """Whether a reply holds two different verdicts, so that the two rules of reading do not agree on it."""
    return len(set(_ratings(text)[0])) > 1 or len(set(_CHOICE.findall(text))) > 1


def _ratings(text: str) -> tuple[list[float], bool]:
    """The numbers in double brackets, or those in single ones where there are none, and whether it was those."""
    if found := _RATING.findall(text):
        return [float(value) for value in found], False
    return [float(value) for value in _LOOSE_RATING.findall(text)], True

"""Replies that end with a verdict in brackets, as MT-Bench's judges are asked for: `[[7]]`, `[[A]]`.

The rule of reading is part of a benchmark's protocol, so the published one is here as it is, next to the one that this
project prefers. Only the judge's own reply is read; it may quote the text that it judges, and with it a verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from ray_pipeline.agents.replies import Read
from ray_pipeline.engines.base import Completion

#: published: the first rating in double brackets, else the first number in single ones; of the choices A before B
#: before C, wherever they stand (FastChat, llm_judge/common.py).
#: unanimous: the same, but a reply that holds two different verdicts has none, and neither has one that was cut off:
#: its verdict would have come last, and what stands before the end may be a quotation. Ratings in single brackets count
#: beside those in double ones. Where `rules_differ` on no reply, both read alike.
Reading = Literal["published", "unanimous"]

_RATING, _LOOSE_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
_CHOICE = re.compile(r"\[\[([ABC])\]\]")


def read_rating(reply: Completion, reading: Reading, low: float, high: float) -> Read | None:
    """`score`, a number in [low, high], or None. A number in single brackets is `repaired`.

    By the published rule a reply that was cut off is read too, where a verdict stands before the end.
    """
    double = [float(value) for value in _RATING.findall(reply.text)]
    single = [float(value) for value in _LOOSE_RATING.findall(reply.text)]  # finds those in double brackets as well
    values = double or single
    if not values or not low <= values[0] <= high:
        return None
    if reading == "unanimous":
        # A number off the scale is no rating in single brackets (a year, an index), and an invalid one in double ones.
        said = {*values, *(value for value in single if low <= value <= high)}
        if reply.finish_reason != "stop" or len(said) > 1:
            return None
    return Read("ok" if double else "repaired", {"score": values[0]})


def read_bracketed_choice(reply: Completion, reading: Reading) -> Read | None:
    """`choice`, which is A, B or C (tie), or None. By the published rule a reply that was cut off is read too."""
    found = set(_CHOICE.findall(reply.text))
    if not found or (reading == "unanimous" and (len(found) > 1 or reply.finish_reason != "stop")):
        return None
    return Read("ok", {"choice": min(found)})


def rules_differ(reply: Completion, read: Callable[[Completion, Reading], Read | None]) -> bool:
    """Whether the published rule takes a verdict from a reply in which the other one sees none."""
    return read(reply, "published") is not None and read(reply, "unanimous") is None

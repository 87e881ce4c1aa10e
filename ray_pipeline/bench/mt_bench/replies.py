"""Replies that end with a verdict in brackets, as MT-Bench's judges are asked for: `[[7]]`, `[[A]]`.

The published rule of reading is part of the benchmark's protocol and is here as FastChat has it. The default is the
reader of all verdicts (`agents/verdicts.py`) in the format `mt_bench`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from ray_pipeline.agents.replies import Read, choice_verdict
from ray_pipeline.agents.verdict_styles import Wanted
from ray_pipeline.agents.verdict_text import without_blocks, without_spans
from ray_pipeline.agents.verdicts import Unread, find_verdict
from ray_pipeline.engines.base import Completion

#: published: the first rating in double brackets, else the first number in single ones; of the choices A before B
#: before C, wherever they stand (FastChat, llm_judge/common.py).
#: unanimous: verdicts where a verdict counts, outside code and quotations, that all agree, in a reply that ended by
#: itself. Another rating in single brackets contradicts it too; alone, one counts only behind the word `Rating`.
Reading = Literal["published", "unanimous"]

_RATING, _LOOSE_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
_CHOICE = re.compile(r"\[\[([ABC])\]\]")
#: A number in single brackets that is no index (`x[1]`) and no link (`[1](…)`).
_ASIDE = re.compile(r"(?<![\w\])\[])\[(\d+\.?\d*)\](?![\](\[])")
_SINGLE = re.compile(r"\brating\b[ \t*_]*:?[ \t*_]*\[\d", re.IGNORECASE)


def read_rating(reply: Completion, reading: Reading, low: float, high: float) -> Read | None:
    """`score`, a number in [low, high], or None. A number in single brackets is `repaired`.

    By the published rule a reply that was cut off is read too, where a verdict stands before the end.
    """
    double = [float(value) for value in _RATING.findall(reply.text)]
    if reading == "published":
        values = double or [float(value) for value in _LOOSE_RATING.findall(reply.text)]
        if not values or not low <= values[0] <= high:
            return None
        return Read("ok" if double else "repaired", {"score": values[0]})

    def rating(value: Any) -> float | None:
        return float(value) if re.fullmatch(r"\d+\.?\d*", str(value)) and low <= float(value) <= high else None

    wanted = Wanted({"": "rating"}, "score", rating, high=int(high))
    said = without_spans(without_blocks(reply.text))
    single = not double and _SINGLE.search(said) is not None
    found = find_verdict(reply, wanted, "lines" if single else "mt_bench")
    if isinstance(found, Unread):
        return None
    # A number off the scale is no rating in single brackets: a year, or a footnote.
    asides = {float(value) for value in _ASIDE.findall(said) if low <= float(value) <= high}
    if asides - {found.values[""]}:
        return None
    return Read("repaired" if single else "ok", {"score": found.values[""]})


def read_bracketed_choice(reply: Completion, reading: Reading) -> Read | None:
    """`choice`, which is A, B or C (tie), or None. By the published rule a reply that was cut off is read too."""
    if reading == "published":
        found = _CHOICE.findall(reply.text)
        return Read("ok", {"choice": min(found)}) if found else None
    read = choice_verdict(reply, "mt_bench")
    return Read("ok", {"choice": read.fields["choice"]}) if isinstance(read, Read) else None


def rules_differ(reply: Completion, read: Callable[[Completion, Reading], Read | None]) -> bool:
    """Whether the published rule takes a verdict from a reply in which the other one sees none."""
    return read(reply, "published") is not None and read(reply, "unanimous") is None

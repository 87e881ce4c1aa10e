"""Replies that score or rank several labelled answers: their grammars and parsers.

A combined verdict is parsed as a whole: every label must have exactly one score in the same reply. A label with two
different scores, a score off the scale, or a heading (`Score A:`) without a readable score leaves the reply without a
verdict; nothing is filled in. As in `replies`, only the judge's own reply is parsed, and a truncated reply has no
verdict.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from ray_pipeline.agents.replies import Read, choice_wanted, object_grammar
from ray_pipeline.agents.verdict_styles import Format, Wanted
from ray_pipeline.agents.verdict_text import introduces_quotation
from ray_pipeline.agents.verdicts import Found, Unread, find_verdict
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion, Grammar

#: Requested form of a reply: one JSON object, or prose that ends with anchored lines (`Score A: 7/10`).
Form = Literal["json", "text"]


class Scale(Settings):
    """The lowest and highest score; `decimals` allows scores such as 8.5."""

    low: int = 0
    high: int = 10
    decimals: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        return self

    @property
    def score_schema(self) -> dict[str, Any]:
        """JSON schema of a score."""
        return {"type": "number" if self.decimals else "integer", "minimum": self.low, "maximum": self.high}

    def number(self, value: Any) -> float | None:
        """The value as a score on this scale, or None; text is accepted if it is just a number."""
        if isinstance(value, bool):
            return None
        if isinstance(value, str):
            if not re.fullmatch(r"[+-]?[0-9]{1,6}(?:\.[0-9]{1,3})?", value.strip()):
                return None
            value = float(value)
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high:  # NaN fails the comparison
            return None
        return float(value) if self.decimals or float(value).is_integer() else None


# --- grammars ---------------------------------------------------------------------------------------------------------


def score_key(label: str) -> str:
    """Key of a label's score in a JSON reply."""
    return f"score_{label.lower()}"


def scores_grammar(labels: Sequence[str], scale: Scale, reason_chars: int) -> Grammar:
    """`{"reason": …, "score_a": …, "score_b": …}`; `reason_chars` 0 leaves out the reason."""
    return object_grammar(reason_chars, **{score_key(label): scale.score_schema for label in labels})


def pick_grammar(options: Sequence[str], reason_chars: int) -> Grammar:
    """`{"reason": …, "choice": one of options}`."""
    return object_grammar(reason_chars, choice={"type": "string", "enum": list(options)})


# --- readers ----------------------------------------------------------------------------------------------------------


def scores_verdict(
    reply: Completion, labels: Sequence[str], scale: Scale, form: Form = "json", format: Format = "quorum"
) -> Read | Unread:
    """`scores` by label and the reason; unread unless every label has exactly one score."""
    wanted = Wanted({label: score_key(label) for label in labels}, "score", scale.number, high=scale.high)
    return _read(find_verdict(reply, wanted, format), form, "scores", lambda values: values)


def rating_verdict(reply: Completion, scale: Scale, form: Form = "json", format: Format = "quorum") -> Read | Unread:
    """`score` of the one answer that was shown, and the reason."""
    wanted = Wanted({"": "score"}, "score", scale.number, high=scale.high)
    return _read(find_verdict(reply, wanted, format), form, "score", _ONLY)


def pick_verdict(
    reply: Completion,
    options: Sequence[str],
    form: Form = "json",
    format: Format = "quorum",
    tie: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Read | Unread:
    """`choice`, one of the options, and the reason.

    Args:
        tie: the option that is a tie; best of k has none.
        names: other names of options, in lower case.
    """
    return _read(find_verdict(reply, choice_wanted(options, tie, names), format), form, "choice", _ONLY)


def last_reply(text: str, turns: int, reader: Callable[[Completion], Read | Unread]) -> Read | Unread:
    """Parse a recorded text of one or more replies joined by blank lines.

    A single turn is parsed as it is. After a retry the verdict is that of the last reply: the shortest tail of the
    text that starts after a blank line and is a verdict by itself.
    """
    whole = reader(_finished(text))
    if turns <= 1:
        return whole
    for match in reversed(list(re.finditer(r"\n[ \t]*\n", text))):
        found = reader(_finished(text[match.end() :]))
        if isinstance(found, Read) and not introduces_quotation(text[: match.end()]):
            return found
    return whole


def _finished(text: str) -> Completion:
    return Completion(text, "stop", 0, 0, 0)


#: The value of a verdict without labels.
_ONLY = operator.itemgetter("")


def _read(found: Found | Unread, form: Form, key: str, of: Callable[[Mapping[str, Any]], Any]) -> Read | Unread:
    """A verdict as the reason and one field."""
    if isinstance(found, Unread):
        return found
    status = "ok" if found.whole == (form == "json") else "repaired"
    return Read(status, {"reason": found.reason, key: of(found.values)})

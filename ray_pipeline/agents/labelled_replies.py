"""Replies that score or rank several labelled answers: their grammars and parsers.

A combined verdict is parsed as a whole: every label must have exactly one score in the same reply. A label with two
different scores, a score off the scale, or a heading (`Score A:`) without a readable score leaves the reply without a
verdict; nothing is filled in. As in `replies`, only the judge's own reply is parsed, and a truncated reply has no
verdict.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import model_validator

from ray_pipeline.agents.replies import Read, embedded_objects, json_object, object_grammar, text_or_none
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion, Grammar

#: Requested form of a reply: one JSON object, or prose that ends with anchored lines (`Score A: 7/10`).
Form = Literal["json", "text"]

T = TypeVar("T")


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
    kind = "number" if scale.decimals else "integer"
    one = {"type": kind, "minimum": scale.low, "maximum": scale.high}
    return object_grammar(reason_chars, **{score_key(label): one for label in labels})


def rating_grammar(scale: Scale, reason_chars: int) -> Grammar:
    """`{"reason": …, "score": …}` of one answer."""
    kind = "number" if scale.decimals else "integer"
    return object_grammar(reason_chars, score={"type": kind, "minimum": scale.low, "maximum": scale.high})


def pick_grammar(options: Sequence[str], reason_chars: int) -> Grammar:
    """`{"reason": …, "choice": one of options}`."""
    return object_grammar(reason_chars, choice={"type": "string", "enum": list(options)})


# --- readers ----------------------------------------------------------------------------------------------------------


def read_scores(reply: Completion, labels: Sequence[str], scale: Scale, form: Form = "json") -> Read | None:
    """`scores` by label and the reason, or None unless every label has exactly one score."""
    headings = {label: _score_heading(label) for label in labels}
    said = _statements(reply, {label: score_key(label) for label in labels}, headings, _number_value(scale.high))
    if said is None:
        return None
    scores = {label: _one(said.values[label], scale.number) for label in labels}
    if None in scores.values():
        return None
    return Read(_status(said.whole, form), {"reason": said.reason, "scores": scores})


def read_rating(reply: Completion, scale: Scale, form: Form = "json") -> Read | None:
    """`score` of the one answer that was shown, and the reason."""
    said = _statements(reply, {"": "score"}, {"": _RATING_HEADING}, _number_value(scale.high))
    if said is None:
        return None
    score = _one(said.values[""], scale.number)
    return None if score is None else Read(_status(said.whole, form), {"reason": said.reason, "score": score})


def read_pick(reply: Completion, options: Sequence[str], form: Form = "json") -> Read | None:
    """`choice`, one of the options, and the reason."""
    letters = tuple(option.upper() for option in options)

    def valid(value: Any) -> str | None:
        return value.strip().upper() if isinstance(value, str) and value.strip().upper() in letters else None

    said = _statements(reply, {"": "choice"}, {"": _PICK_HEADING}, _word_value(letters))
    if said is None:
        return None
    choice = _one(said.values[""], valid)
    return None if choice is None else Read(_status(said.whole, form), {"reason": said.reason, "choice": choice})


def last_reply(text: str, turns: int, reader: Callable[[Completion], Read | None]) -> Read | None:
    """Parse a recorded text of one or more replies joined by blank lines.

    A single turn is parsed as it is. After a retry the verdict is that of the last reply: the shortest tail of the
    text that starts after a blank line and is a verdict by itself.
    """
    if turns <= 1:
        return reader(_finished(text))
    begins = [match.end() for match in re.finditer(r"\n[ \t]*\n", text)]
    for begin in [*reversed(begins), 0]:
        found = reader(_finished(text[begin:]))
        if found is not None:
            return found
    return None


def _finished(text: str) -> Completion:
    return Completion(text, "stop", 0, 0, 0)


@dataclasses.dataclass
class _Said:
    """Everything in a reply that looks like a verdict, by label; None for a heading without a readable value."""

    values: dict[str, list[Any]]
    reason: str | None
    whole: bool


def _statements(
    reply: Completion, keys: Mapping[str, str], headings: Mapping[str, re.Pattern[str]], value: re.Pattern[str]
) -> _Said | None:
    if reply.finish_reason != "stop":
        return None
    text = reply.text.strip()
    whole = json_object(text)
    if whole is not None:
        return _Said({k: [whole.get(name)] for k, name in keys.items()}, text_or_none(whole.get("reason")), True)
    objects, rest = embedded_objects(text)
    said: dict[str, list[Any]] = {label: [] for label in keys}
    reason, first = None, len(text)
    for found in objects:
        for label, name in keys.items():
            if name in found:
                said[label].append(found[name])
                reason = reason or text_or_none(found.get("reason"))
    for label, heading in headings.items():
        for match in heading.finditer(text):
            first = min(first, match.start())
            follows = value.match(text, match.end())
            said[label].append(follows.group(1) if follows else None)
    if any(said.values()):
        # Remains of an object cut by a quotation must agree with the rest.
        for label, name in keys.items():
            said[label] += re.findall(rf'"{re.escape(name)}"\s*:\s*"?([^",}}\s]*)', rest)
    elif len(keys) == 1 and (bare := value.fullmatch(text.lstrip("#*_`\"'[( \t\n"))):
        (label,) = keys
        said[label].append(bare.group(1))
        first = 0
    return _Said(said, reason or text[:first].strip() or None, False)


def _one(values: Sequence[Any], valid: Callable[[Any], T | None]) -> T | None:
    """The value that all agree on, or None if there is none, more than one, or an invalid one."""
    found = [valid(value) for value in values]
    return found[0] if found and None not in found and len(set(found)) == 1 else None


def _status(whole: bool, form: Form) -> str:
    return "ok" if whole == (form == "json") else "repaired"


# A heading is a line, or the start of one; a line that starts with `>` is a quotation and not a heading.
_MARKS, _CLOSES = r"[ \t*_`\"'#•-]{0,12}", r"[ \t*_`\"'\])]{0,6}"
_SAYS = rf"{_CLOSES}[:=][ \t*_`\"']{{0,6}}"
_RATING_HEADING = re.compile(rf"^{_MARKS}(?:overall[ \t]+|final[ \t]+)?score{_SAYS}", re.IGNORECASE | re.MULTILINE)
_PICK_HEADING = re.compile(
    rf"^{_MARKS}(?:final[ \t]+|overall[ \t]+)?(?:answer|choice|verdict){_SAYS}", re.IGNORECASE | re.MULTILINE
)


@functools.cache
def _score_heading(label: str) -> re.Pattern[str]:
    """`Score A:`, `### Score Assistant A:`, `Score of response A =`."""
    of = r"(?:[ \t]+(?:of|for))?(?:[ \t]+(?:the[ \t]+)?(?:assistant|response|answer|candidate))?"
    marks = r"[ \t*_`\"'\[(]{1,6}"
    return re.compile(
        rf"^{_MARKS}(?:overall[ \t]+|final[ \t]+)?score{of}{marks}{re.escape(label)}{_SAYS}",
        re.IGNORECASE | re.MULTILINE,
    )


#: The value follows its heading, on the same line or the next non-empty one, and nothing follows the value.
_GAP, _END = r"(?:[ \t]*\r?\n){0,3}[ \t*_`\"'\[(]{0,8}", r"[ \t\r*_`\"'\])},.;!]{0,12}(?:$|\Z)"


@functools.cache
def _number_value(high: int) -> re.Pattern[str]:
    """`7`, `8.5`, and, on a scale that ends at 10, `7/10` and `7 out of 10`."""
    return re.compile(
        rf"{_GAP}([+-]?[0-9]+(?:\.[0-9]+)?)(?:[ \t]*(?:/|out of)[ \t]*{high})?{_END}", re.IGNORECASE | re.MULTILINE
    )


@functools.cache
def _word_value(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"{_GAP}({'|'.join(map(re.escape, words))}){_END}", re.IGNORECASE | re.MULTILINE)

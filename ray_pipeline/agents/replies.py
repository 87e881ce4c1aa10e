"""The one place where replies of judging models are read.

A reply is asked for as a JSON object under a grammar. Without a grammar a model may wrap the object in prose or write
anchored lines (`Score: 7`). Only the model's own reply is read, never the text that it judges; a reply that holds two
different verdicts has none; a reply that was cut off (`finish_reason` is not `stop`) has none.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ray_pipeline.engines.base import Completion, Grammar, TokenLogprobs
from ray_pipeline.store.schemas import FAILURE_TYPES

#: Mass that whole score strings must have before an expected score is given (design: raw, unmasked log-probabilities).
MIN_SCORE_MASS = 0.5


@dataclasses.dataclass(frozen=True)
class Read:
    """A reply that was read: status `ok` (as asked) or `repaired` (found in looser text), and its fields."""

    status: str
    fields: dict[str, Any]


def score_grammar(low: int, high: int, reason_chars: int) -> Grammar:
    """`{"reason": …, "score": …}`; with `reason_chars` 0 the score alone."""
    properties: dict[str, Any] = {}
    if reason_chars:
        properties["reason"] = {"type": "string", "maxLength": reason_chars}
    properties["score"] = {"type": "integer", "minimum": low, "maximum": high}
    return _object(properties)


def critique_grammar(reason_chars: int) -> Grammar:
    """`{"reason": …, "failure_type": …, "flawed": …}`."""
    return _object(
        {
            "reason": {"type": "string", "maxLength": reason_chars},
            "failure_type": {"type": "string", "enum": list(FAILURE_TYPES)},
            "flawed": {"type": "boolean"},
        }
    )


def choice_grammar(reason_chars: int) -> Grammar:
    """`{"reason": …, "choice": "A" | "B" | "C"}`; C is a tie."""
    return _object(
        {
            "reason": {"type": "string", "maxLength": reason_chars},
            "choice": {"type": "string", "enum": ["A", "B", "C"]},
        }
    )


def _object(properties: dict[str, Any]) -> Grammar:
    return Grammar.json(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def read_score(reply: Completion, low: int, high: int) -> Read | None:
    """An integer score in [low, high], or None when the reply has no single one."""
    return _read(reply, lambda fields: _valid_score(fields, low, high), _SCORE_LINE, "score")


def read_critique(reply: Completion) -> Read | None:
    """`flawed` and a failure type that agrees with it (`none` exactly for an unflawed answer), or None."""
    return _read(reply, _valid_critique, None, "")


def read_choice(reply: Completion) -> Read | None:
    """A choice of A, B or C (tie), or None."""
    return _read(reply, _valid_choice, _CHOICE_LINE, "choice")


#: A line of its own that says nothing but the verdict. `7/10` says it too, and its 10 is not the score.
_SCORE_LINE = re.compile(r"^\W{0,3}score\W{1,4}(-?\d+)(?:\s*/\s*\d+)?\W{0,3}$", re.IGNORECASE | re.MULTILINE)
_CHOICE_LINE = re.compile(r"^\W{0,3}(?:choice|verdict)\W{1,6}([ABC])\W{0,4}$", re.IGNORECASE | re.MULTILINE)


def _read(reply: Completion, valid: Any, line: re.Pattern[str] | None, key: str) -> Read | None:
    if reply.finish_reason != "stop":
        return None
    text = reply.text.strip()
    fields = _json_object(text)
    if fields is not None:
        fields = valid(fields)
        return Read("ok", fields) if fields is not None else None
    found = [f for f in map(valid, _embedded_objects(text)) if f is not None]
    if not found and line is not None:
        found = [f for f in (valid({key: match}) for match in line.findall(text)) if f is not None]
    distinct = {json.dumps({k: v for k, v in f.items() if k != "reason"}, sort_keys=True) for f in found}
    if len(distinct) != 1:
        return None
    return Read("repaired", found[-1])


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _embedded_objects(text: str) -> list[dict[str, Any]]:
    """Flat JSON objects inside prose or code fences."""
    objects = (_json_object(match) for match in re.findall(r"\{[^{}]*\}", text))
    return [o for o in objects if o is not None]


def _valid_score(fields: dict[str, Any], low: int, high: int) -> dict[str, Any] | None:
    score = _integer(fields.get("score"))
    if score is None or not low <= score <= high:
        return None
    return {"reason": _text(fields.get("reason")), "score": score}


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,4}", value.strip()):
        return int(value)
    return None


def _valid_critique(fields: dict[str, Any]) -> dict[str, Any] | None:
    flawed, kind = fields.get("flawed"), fields.get("failure_type")
    if not isinstance(flawed, bool) or kind not in FAILURE_TYPES or flawed != (kind != "none"):
        return None
    return {"reason": _text(fields.get("reason")), "flawed": flawed, "failure_type": kind}


def _valid_choice(fields: dict[str, Any]) -> dict[str, Any] | None:
    choice = fields.get("choice")
    if not isinstance(choice, str) or choice.strip().upper() not in ("A", "B", "C"):
        return None
    return {"reason": _text(fields.get("reason")), "choice": choice.strip().upper()}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def expected_score(text: str, logprobs: TokenLogprobs | None, low: int, high: int) -> float | None:
    """Mean of the score under the model's own probabilities, over whole score strings, renormalised.

    The score is the last integer of the reply. At the token where it begins, an alternative counts when it is a whole
    score; the score that was sampled may span several tokens, whose probabilities multiply. An alternative that other
    scores go on from (a lone `1` where the scale has a 10, beside another sampled score) is ambiguous and counts for
    none.

    Returns:
        None when there are no log-probabilities or the counted mass is under `MIN_SCORE_MASS`.
    """
    if not logprobs:
        return None
    matches = list(re.finditer(r"-?\d+", text))
    if not matches:
        return None
    begin, end = matches[-1].span()
    steps = _covering(logprobs, begin, end)
    if steps is None:
        return None
    first, last, lead = steps
    mass: dict[int, float] = {}
    sampled = matches[-1].group()
    scale = {str(value): value for value in range(low, high + 1)}
    if sampled in scale:
        mass[scale[sampled]] = math.exp(sum(logprobs[step][0][1] for step in range(first, last + 1)))
    for token, value in logprobs[first][1:]:
        string = token[lead:].strip() if token[:lead] == logprobs[first][0][0][:lead] else token.strip()
        string = re.sub(r"\D+$", "", string)
        ambiguous = any(other != string and other.startswith(string) for other in scale) and token.strip() == string
        if string in scale and not ambiguous and scale[string] not in mass:
            mass[scale[string]] = math.exp(value)
    total = sum(mass.values())
    if total < MIN_SCORE_MASS:
        return None
    return sum(score * weight for score, weight in mass.items()) / total


def _covering(logprobs: Sequence[Sequence[tuple[str, float]]], begin: int, end: int) -> tuple[int, int, int] | None:
    """First and last token over the characters [begin, end), and how far into the first one they begin."""
    position = 0
    first = last = None
    lead = 0
    for index, step in enumerate(logprobs):
        token = step[0][0]
        if first is None and position <= begin < position + len(token):
            first, lead = index, begin - position
        if position < end <= position + len(token):
            last = index
        position += len(token)
    return None if first is None or last is None else (first, last, lead)

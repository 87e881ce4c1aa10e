"""The parsers of judging models' replies, and the grammars that constrain them.

A reply is requested as a JSON object under a grammar. Without a grammar a model may wrap the object in prose or write
anchored lines (`Score: 7`). Only the model's own reply is parsed, never the text that it judges. A reply with two
different verdicts has no verdict, and neither has a truncated one (`finish_reason` is not `stop`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.agents.verdict_styles import Format, Wanted
from ray_pipeline.agents.verdicts import Found, Unread, find_verdict, line_statements
from ray_pipeline.engines.base import Completion, Grammar, TokenLogprobs
from ray_pipeline.store.schemas import FAILURE_TYPES

#: Minimum mass of whole score strings for an expected score (engines return raw, unmasked log-probabilities).
MIN_SCORE_MASS = 0.5


@dataclasses.dataclass(frozen=True)
class Read:
    """A parsed reply: status `ok` (in the requested form) or `repaired` (found in looser text), and its fields."""

    status: str
    fields: dict[str, Any]


def score_grammar(low: int, high: int, reason_chars: int) -> Grammar:
    """`{"reason": …, "score": …}`; `reason_chars` 0 leaves out the reason."""
    return object_grammar(reason_chars, score={"type": "integer", "minimum": low, "maximum": high})


def critique_grammar(reason_chars: int) -> Grammar:
    """`{"reason": …, "failure_type": …, "flawed": …}`; `reason_chars` 0 leaves out the reason."""
    failure = {"type": "string", "enum": list(FAILURE_TYPES)}
    return object_grammar(reason_chars, failure_type=failure, flawed={"type": "boolean"})


def review_grammar(reason_chars: int, feedback_chars: int, scale: tuple[int, int] | None, decimals: int = 0) -> Grammar:
    """`{"reason": …, "feedback": …, "score": …}`; the score is left out without a scale."""
    kind = "number" if decimals else "integer"
    score = {} if scale is None else {"score": {"type": kind, "minimum": scale[0], "maximum": scale[1]}}
    return object_grammar(reason_chars, feedback={"type": "string", "maxLength": feedback_chars}, **score)


def object_grammar(reason_chars: int, **fields: dict[str, Any]) -> Grammar:
    """A JSON object of these fields, preceded by a reason of at most `reason_chars` characters unless that is 0."""
    reason = {"reason": {"type": "string", "maxLength": reason_chars}} if reason_chars else {}
    properties = {**reason, **fields}
    return Grammar.json(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def score_verdict(reply: Completion, low: int, high: int, format: Format = "quorum") -> Read | Unread:
    """An integer score in [low, high]; a reply without a single one is unread."""
    return _one(find_verdict(reply, _score_wanted(low, high), format), "score")


def critique_verdict(reply: Completion) -> Read | Unread:
    """`flawed` and a failure type that agrees with it (`none` exactly when not flawed)."""
    return _fields(find_verdict(reply, Wanted({"": "flawed"}, "fields", whole=_valid_critique)))


def choice_verdict(reply: Completion, format: Format = "quorum") -> Read | Unread:
    """A choice of A, B or C (tie)."""
    return _one(find_verdict(reply, choice_wanted(("A", "B", "C"), tie="C"), format), "choice")


def review_verdict(reply: Completion, scale: tuple[int, int] | None, decimals: int = 0) -> Read | Unread:
    """`feedback` (empty: nothing to improve) and, with a scale, a `score` on it, rounded to `decimals` places."""
    wanted = Wanted({"": "feedback"}, "fields", whole=lambda fields: _valid_review(fields, scale, decimals))
    return _fields(find_verdict(reply, wanted))


def _one(found: Found | Unread, key: str) -> Read | Unread:
    if isinstance(found, Unread):
        return found
    return Read("ok" if found.whole else "repaired", {"reason": found.said, key: found.values[""]})


def _fields(found: Found | Unread) -> Read | Unread:
    if isinstance(found, Unread):
        return found
    return Read("ok" if found.whole else "repaired", {"reason": found.said, **found.values[""]})


def _score_wanted(low: int, high: int) -> Wanted:
    def valid(value: Any) -> int | None:
        score = _integer(value)
        return score if score is not None and low <= score <= high else None

    return Wanted({"": "score"}, "score", valid, high=high)


def choice_wanted(options: Sequence[str], tie: str | None = None, names: Mapping[str, str] | None = None) -> Wanted:
    """A choice of one of the options; `names` are other names of them."""
    letters = tuple(option.upper() for option in options)

    def valid(value: Any) -> str | None:
        return value.strip().upper() if isinstance(value, str) and value.strip().upper() in letters else None

    return Wanted({"": "choice"}, "choice", valid, options=letters, tie=tie, names=names or {})


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,4}", value.strip()):
        return int(value)
    return None


def _valid_critique(fields: dict[str, Any]) -> dict[str, Any] | None:
    flawed, kind = fields.get("flawed"), fields.get("failure_type")
    if not isinstance(flawed, bool) or kind not in FAILURE_TYPES or flawed != (kind != "none"):
        return None
    return {"flawed": flawed, "failure_type": kind}


def _decimal(value: Any, decimals: int) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,4})?", value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return round(float(value), decimals)


def _valid_review(fields: dict[str, Any], scale: tuple[int, int] | None, decimals: int) -> dict[str, Any] | None:
    feedback, score = fields.get("feedback"), None
    if not isinstance(feedback, str):
        return None
    if scale is not None:
        score = _decimal(fields.get("score"), decimals) if decimals else _integer(fields.get("score"))
        if score is None or not scale[0] <= score <= scale[1]:
            return None
    return {"feedback": feedback.strip(), "score": score}


def expected_score(text: str, logprobs: TokenLogprobs | None, low: int, high: int) -> float | None:
    """Mean of the score under the model's own probabilities, over whole score strings, renormalised.

    The sampled tokens are followed from the start of the reply's score to its end. At each of them, every alternative
    that completes a score counts with the probability of the whole string: that of the tokens before it times its own.
    So `10` is the same score in one token and in two, and `1` counts only with the probability that the next token
    ends it. An alternative that was not sampled and is a prefix of other scores (`1` beside a sampled `7` on a scale
    up to 10) is ambiguous and not counted.

    Args:
        text: a reply that `score_verdict` can parse.
        logprobs: raw log-probabilities of all its tokens, not masked by the grammar.

    Returns:
        None without log-probabilities, when they do not match the text, or when the counted mass is below
        `MIN_SCORE_MASS`.
    """
    if not logprobs:
        return None
    tokens = [step[0][0] if step else "" for step in logprobs]
    joined = "".join(tokens)  # Some tokenizers lose white space here, and an end token may follow.
    where = text if joined.startswith(text) else joined
    span, asked = _score_span(where, low, high), _score_span(text, low, high)
    if span is None or asked is None or where[slice(*span)] != text[slice(*asked)]:
        return None
    first, position = 0, 0
    while position + len(tokens[first]) <= span[0]:
        position += len(tokens[first])
        first += 1

    scale = {str(value): value for value in range(low, high + 1)}
    mass: dict[int, float] = collections.defaultdict(float)
    before, log_before = "", 0.0
    lead: str | None = tokens[first][: span[0] - position]
    for step in logprobs[first:]:
        sampled_goes_on = True
        for rank, (token, value) in enumerate(step):
            piece = _without(lead, token)
            if piece is None:
                continue
            digits = piece[: len(piece) - len(piece.lstrip("0123456789" if before else "-+0123456789"))]
            string = before + digits
            goes_on = len(digits) == len(piece) and any(o != string and o.startswith(string) for o in scale)
            if not goes_on and string in scale:
                mass[scale[string]] += math.exp(min(0.0, log_before + value))
            if rank == 0:
                sampled_goes_on, sampled, log_sampled = goes_on, string, value
        if not step:
            continue
        if not sampled_goes_on:
            break
        before, log_before, lead = sampled, log_before + log_sampled, None
    else:  # The reply ends with its score.
        if before in scale:
            mass[scale[before]] += math.exp(min(0.0, log_before))
    total = sum(mass.values())
    if not total >= MIN_SCORE_MASS:  # NaN, too
        return None
    return sum(score * weight for score, weight in mass.items()) / total


def _score_span(text: str, low: int, high: int) -> tuple[int, int] | None:
    """Start and end of the digits of the score that `score_verdict` returns."""
    fields = list(re.finditer(r'"score"\s*:\s*"?([+-]?[0-9]+)', text))
    if fields:
        return fields[-1].span(1)
    lines = line_statements(text, _score_wanted(low, high))
    digits = [
        m for s in lines if s.value is not None and (m := re.compile(r"[+-]?[0-9]+").search(text, s.begin, s.end))
    ]
    return digits[-1].span() if digits else None


def _without(lead: str | None, token: str) -> str | None:
    """A token without the characters that precede the score in the sampled token, or None if it starts differently.

    White space is ignored; `lead` is None when the score began in an earlier token.
    """
    if lead is None:
        return token
    if not lead.strip():
        return token.lstrip()
    return token[len(lead) :] if token.startswith(lead) else None

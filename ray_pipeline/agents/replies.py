"""The parsers of judging models' replies, and the grammars that constrain them.

A reply is requested as a JSON object under a grammar. Without a grammar a model may wrap the object in prose or write
anchored lines (`Score: 7`). Only the model's own reply is parsed, never the text that it judges. A reply with two
different verdicts has no verdict, and neither has a truncated one (`finish_reason` is not `stop`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from ray_pipeline.engines.base import Completion, Grammar, TokenLogprobs
from ray_pipeline.store.schemas import FAILURE_TYPES

#: Minimum mass of whole score strings for an expected score (engines return raw, unmasked log-probabilities).
MIN_SCORE_MASS = 0.5


@dataclasses.dataclass(frozen=True)
class Read:
    """A parsed reply: status `ok` (in the requested form) or `repaired` (found in looser text), and its fields."""

    status: str
    fields: dict[str, Any]


#: Maps the fields of a reply to those that are used, or to None when they are not a verdict.
_Valid = Callable[[dict[str, Any]], dict[str, Any] | None]


def score_grammar(low: int, high: int, reason_chars: int) -> Grammar:
    """`{"reason": …, "score": …}`; `reason_chars` 0 leaves out the reason."""
    return object_grammar(reason_chars, score={"type": "integer", "minimum": low, "maximum": high})


def critique_grammar(reason_chars: int) -> Grammar:
    """`{"reason": …, "failure_type": …, "flawed": …}`; `reason_chars` 0 leaves out the reason."""
    failure = {"type": "string", "enum": list(FAILURE_TYPES)}
    return object_grammar(reason_chars, failure_type=failure, flawed={"type": "boolean"})


def choice_grammar(reason_chars: int) -> Grammar:
    """`{"reason": …, "choice": "A" | "B" | "C"}`; C is a tie; `reason_chars` 0 leaves out the reason."""
    return object_grammar(reason_chars, choice={"type": "string", "enum": ["A", "B", "C"]})


def review_grammar(reason_chars: int, feedback_chars: int, scale: tuple[int, int] | None) -> Grammar:
    """`{"reason": …, "feedback": …, "score": …}`; the score is left out without a scale."""
    score = {} if scale is None else {"score": {"type": "integer", "minimum": scale[0], "maximum": scale[1]}}
    return object_grammar(reason_chars, feedback={"type": "string", "maxLength": feedback_chars}, **score)


def object_grammar(reason_chars: int, **fields: dict[str, Any]) -> Grammar:
    """A JSON object of these fields, preceded by a reason of at most `reason_chars` characters unless that is 0."""
    reason = {"reason": {"type": "string", "maxLength": reason_chars}} if reason_chars else {}
    properties = {**reason, **fields}
    return Grammar.json(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def read_score(reply: Completion, low: int, high: int) -> Read | None:
    """An integer score in [low, high], or None when the reply has no single one."""
    return _read(reply, lambda fields: _valid_score(fields, low, high), "score", _score_line(high))


def read_critique(reply: Completion) -> Read | None:
    """`flawed` and a failure type that agrees with it (`none` exactly when not flawed), or None."""
    return _read(reply, _valid_critique, "flawed", None)


def read_choice(reply: Completion) -> Read | None:
    """A choice of A, B or C (tie), or None."""
    return _read(reply, _valid_choice, "choice", _CHOICE_LINE)


def read_review(reply: Completion, scale: tuple[int, int] | None) -> Read | None:
    """`feedback` (empty: nothing to improve) and, with a scale, a `score` on it; None if unreadable."""
    return _read(reply, lambda fields: _valid_review(fields, scale), "feedback", None)


def _line(words: str, value: str) -> re.Pattern[str]:
    """A line, or a whole reply, that consists of the verdict alone.

    Emphasis, list marks and quotation marks around it are ignored; a leading `>` is not, because it marks a quotation.
    """
    marks, ends = r"[ \t*_`\"'#•-]{0,12}", r"[ \t\r*_`\"'\])},.;!]{0,12}"
    says = r"[ \t*_`\"']{0,6}(?:[:=]|[ \t][–—-](?=[ \t])|(?<=[ \t]))[ \t*_`\"']{0,6}"
    labelled, bare = rf"^{marks}(?:{words}){says}[\[(]{{0,3}}{value}{ends}$", rf"\A[*_`\"'\[(]{{0,6}}{value}{ends}\Z"
    return re.compile(f"{labelled}|{bare}", re.IGNORECASE | re.MULTILINE | re.ASCII)


@functools.cache
def _score_line(high: int) -> re.Pattern[str]:
    """`Score: 7`; on a scale that ends at 10 also `7/10` and `7 out of 10`, where 10 is not the score."""
    return _line("score", rf"([+-]?\d+)(?:[ \t]*(?:/|out of)[ \t]*{high})?")


_CHOICE_LINE = _line("choice|verdict", "([ABC])")


def _read(reply: Completion, valid: _Valid, key: str, line: re.Pattern[str] | None) -> Read | None:
    if reply.finish_reason != "stop":
        return None
    text = reply.text.strip()
    whole = json_object(text)
    if whole is not None:
        fields = valid(whole)
        return Read("ok", fields) if fields is not None else None
    objects, rest = embedded_objects(text)
    said = [o for o in objects if key in o]
    if line is not None:
        said += [{key: _value(match)} for match in line.finditer(text)]
    if not said:
        return None
    # The reply may quote the text that it judges without escaping it. So everything that looks like a verdict must
    # agree, including invalid ones and the remains of an object cut by a quotation.
    said += [{key: value} for value in re.findall(rf'"{key}"\s*:\s*"?([^",}}\s]*)', rest)]
    found = [fields for fields in map(valid, said) if fields is not None]
    distinct = {json.dumps({k: v for k, v in f.items() if k != "reason"}, sort_keys=True) for f in found}
    if len(found) < len(said) or len(distinct) != 1:
        return None
    return Read("repaired", next((f for f in found if f["reason"]), found[0]))


def _value(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("duplicate key in a JSON object")
    return fields


#: The requested form; and that of models without a grammar, which leave line breaks inside strings.
_STRICT = json.JSONDecoder(object_pairs_hook=_distinct_keys)
_LOOSE = json.JSONDecoder(object_pairs_hook=_distinct_keys, strict=False)
#: The start of an object: a brace followed by anything else is prose.
_OBJECT = re.compile(r'\{\s*["}]')


def json_object(text: str) -> dict[str, Any] | None:
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def embedded_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """JSON objects inside prose or code fences, outermost ones only, and the text around them.

    If one of them is damaged, none is returned: the others may be quotations, and the damaged one the verdict.
    """
    found, rest, read = [], "", 0
    while (begins := _OBJECT.search(text, read)) is not None:
        try:
            value, end = _LOOSE.raw_decode(text, begins.start())
        except (ValueError, RecursionError):
            return [], text
        found.append(value)
        rest, read = rest + text[read : begins.start()], end
    return found, rest + text[read:]


def _valid_score(fields: dict[str, Any], low: int, high: int) -> dict[str, Any] | None:
    score = _integer(fields.get("score"))
    if score is None or not low <= score <= high:
        return None
    return {"reason": text_or_none(fields.get("reason")), "score": score}


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
    return {"reason": text_or_none(fields.get("reason")), "flawed": flawed, "failure_type": kind}


def _valid_choice(fields: dict[str, Any]) -> dict[str, Any] | None:
    choice = fields.get("choice")
    if not isinstance(choice, str) or choice.strip().upper() not in ("A", "B", "C"):
        return None
    return {"reason": text_or_none(fields.get("reason")), "choice": choice.strip().upper()}


def _valid_review(fields: dict[str, Any], scale: tuple[int, int] | None) -> dict[str, Any] | None:
    feedback, score = fields.get("feedback"), None
    if not isinstance(feedback, str):
        return None
    if scale is not None:
        score = _integer(fields.get("score"))
        if score is None or not scale[0] <= score <= scale[1]:
            return None
    return {"reason": text_or_none(fields.get("reason")), "feedback": feedback.strip(), "score": score}


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def expected_score(text: str, logprobs: TokenLogprobs | None, low: int, high: int) -> float | None:
    """Mean of the score under the model's own probabilities, over whole score strings, renormalised.

    The sampled tokens are followed from the start of the reply's score to its end. At each of them, every alternative
    that completes a score counts with the probability of the whole string: that of the tokens before it times its own.
    So `10` is the same score in one token and in two, and `1` counts only with the probability that the next token
    ends it. An alternative that was not sampled and is a prefix of other scores (`1` beside a sampled `7` on a scale
    up to 10) is ambiguous and not counted.

    Args:
        text: a reply that `read_score` can parse.
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
    span, asked = _score_span(where, high), _score_span(text, high)
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


def _score_span(text: str, high: int) -> tuple[int, int] | None:
    """Start and end of the digits of the score that `read_score` returns."""
    fields = list(re.finditer(r'"score"\s*:\s*"?([+-]?[0-9]+)', text)) or list(_score_line(high).finditer(text))
    if not fields:
        return None
    match = fields[-1]
    return match.span(next(i for i, group in enumerate(match.groups(), 1) if group is not None))


def _without(lead: str | None, token: str) -> str | None:
    """A token without the characters that precede the score in the sampled token, or None if it starts differently.

    White space is ignored; `lead` is None when the score began in an earlier token.
    """
    if lead is None:
        return token
    if not lead.strip():
        return token.lstrip()
    return token[len(lead) :] if token.startswith(lead) else None

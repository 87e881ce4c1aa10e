"""The one reader of verdicts: house styles in which judges write them, live or recorded.

A reply holds statements (an object, a line, brackets) in the styles of its format. It has a verdict if they agree, are
valid, and stand where a verdict counts (`verdict_text`); otherwise it is unread, with a reason. Formats are the house
styles by name:

    quorum      `{"reason": …, "score": 7}`, `Score: 7`, `Choice: A`, `Score A: 7`, or nothing but `7`
    json        an object with `score`, `rating`, `choice`, `winner`, `verdict`, …
    lines       `Rating: 8/10`, `Verdict: tie`, `Score of Assistant 1: 8`
    mt_bench    `[[8]]`, `[[A]]`, where `[[C]]` is a tie
    arena_hard  `[[A>>B]]`, `[[A=B]]`
    llmbar      `Output (a) is better.`
    boxed       `\\boxed{A}`
    tags        `<answer>A</answer>`, `<score>8</score>`
    ranks       AlpacaEval's `[{"model": "m", "rank": 1}, …]`
    pandalm     first line `1`, `2` or `Tie`
    vicuna      first line `8 7`
    prometheus  `[RESULT] 4`
    auto        any of them; statements in several styles must agree
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from ray_pipeline.agents.verdict_styles import (
    FORMATS_OF_OBJECTS,
    ITEM,
    NUMBER,
    STYLES_OF,
    Format,
    Statement,
    Wanted,
    bare,
    foreign,
    json_object,
    lines,
    of_object,
    text_of,
)
from ray_pipeline.agents.verdict_text import at_place, without_blocks, without_spans
from ray_pipeline.engines.base import Completion
from ray_pipeline.engines.thoughts import as_verdict

#: Why a reply has no verdict. absent: no statement in the format. quoted: statements only where they are quotations or
#: asides. contradictory: two of them differ. invalid: off the scale, not an option, or unreadable. incomplete: a label
#: without a score. cut_off: the reply did not end by itself.
Why = Literal["absent", "quoted", "contradictory", "invalid", "incomplete", "cut_off"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A verdict.

    Attributes:
        values: by label.
        reason: the judge's, or what precedes the verdict.
        whole: whether the reply is nothing but one JSON object.
        said: the reason inside the object.
    """

    values: dict[str, Any]
    reason: str | None
    whole: bool
    said: str | None = None


@dataclasses.dataclass(frozen=True)
class Unread:
    """Why a reply has no verdict; `reason` is the text for the column of that name."""

    why: Why

    @property
    def reason(self) -> str:
        return f"unread: {self.why}"


def unread_reasons(reasons: Iterable[str | None]) -> dict[str, int]:
    """Counts of unread replies by why, from the column `reason`."""
    found = collections.Counter(why for reason in reasons for why in _UNREAD.findall(reason or ""))
    return dict(sorted(found.items()))


_UNREAD = re.compile(rf"^unread: ({'|'.join(get_args(Why))})$", re.MULTILINE)


_QUOTE_MARK = re.compile(r"^[ \t]{0,3}>", re.MULTILINE)


def find_verdict(reply: Completion, wanted: Wanted, format: Format = "quorum") -> Found | Unread:
    """The verdict of a reply in a format, or why there is none."""
    reply = as_verdict(reply)
    if reply.finish_reason != "stop":
        return Unread("cut_off")
    text = reply.text.strip()
    whole = json_object(text)
    if whole is not None and format in FORMATS_OF_OBJECTS:
        stated = list(of_object(whole, wanted, format, 0, len(text)))
        found = _settled(stated, wanted)
        return (
            found if isinstance(found, Unread) else Found(found, reason := text_of(whole.get("reason")), True, reason)
        )
    blocks = without_blocks(text)
    spans = without_spans(blocks)
    stated = [statement for style in STYLES_OF[format] for statement in style(blocks, spans, wanted, format)]
    counted = [s for s in stated if not s.weak or at_place(blocks, s.begin, s.end)]
    if not counted:
        quoted = stated or (
            text != blocks and any(lines(unquoted := _QUOTE_MARK.sub(" ", text), unquoted, wanted, format))
        )
        return Unread("quoted" if quoted else "absent")
    found = _settled(counted, wanted)
    if isinstance(found, Unread):
        return found
    first, last = min(s.begin for s in counted), max(s.end for s in counted)
    # The last first: a model that repeats its line for ever has hundreds, and each look is at the rest of the reply.
    spans_of_one = ((s.begin, s.end) for s in reversed(counted))
    if not any(at_place(blocks, *span) for span in (spans_of_one if len(wanted.keys) == 1 else [(first, last)])):
        return Unread("quoted")
    if wanted.kind != "fields" and _rivals(blocks, counted, wanted, found):
        return Unread("contradictory")
    said = next((s.reason for s in counted if s.reason), None)
    return Found(found, said or text[:first].strip() or None, False, said)


def line_statements(text: str, wanted: Wanted) -> list[Statement]:
    """Anchored lines of a text, or the one value that it consists of."""
    blocks = without_blocks(text)
    return [*lines(blocks, blocks, wanted, "quorum"), *bare(blocks, blocks, wanted, "quorum")]


def _settled(stated: Sequence[Statement], wanted: Wanted) -> dict[str, Any] | Unread:
    values: dict[str, Any] = {}
    for label in wanted.keys:
        own = [statement.value for statement in stated if statement.label == label]
        valid = [value for value in own if value is not None]
        if any(value != valid[0] for value in valid) or (valid and len(valid) < len(own)):
            return Unread("contradictory")
        if own and not valid:
            return Unread("invalid")
        values[label] = valid[0] if valid else None
    missing = [label for label, value in values.items() if value is None]
    if missing:
        return Unread("incomplete" if len(missing) < len(values) else "absent")
    return values


#: Scores in the judge's own sentences. The number of an answer is not one.
_OWN_SCORE = re.compile(
    r"\b(?:(?:I|I'd|I'll|we)\b[^.\n]{0,30}\b(?:give|rate|score|grade|assign|award)\b[^.\n]{0,30}?|"
    r"my (?:own |final |overall |actual )?(?:rating|score|grade|verdict)(?: is| would be|:)[^.\n]{0,15}?|"
    rf"\b(?:it|response|answer) (?:deserves|merits|earns|gets)[^.\n]{{0,15}}?)\b({NUMBER})(?![0-9]|[ \t]+\w+s\b)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(rf"\b{ITEM}s?[ \t]+#?[0-9]+", re.IGNORECASE)


#: Choices in the judge's own sentences.
_OWN_CHOICE = re.compile(
    r"\b(?:I|I'd|I'll)(?: would| will| still| clearly| strongly)? "
    rf"(?:prefer|choose|pick|favou?r|select|vote for|go with) (?:{ITEM} )?\(?((?-i:[A-Z12]))\b(?!['’])",
    re.IGNORECASE,
)


#: Verdicts in any style, wherever in a line: what follows a verdict must not hold another.
_LATER = {
    "score": re.compile(
        rf"(?:\b(?:score|rating|grade|verdict)\b[^\w\n]{{0,8}}(?:is\b)?[^\w\n]{{0,8}}|"
        r"\[\[\s*|\\boxed\{\s*|"
        rf"<(?:score|rating|grade|answer|verdict)>\s*|\[RESULT\]\W{{0,4}})({NUMBER})",
        re.IGNORECASE,
    ),
    "choice": re.compile(
        r"(?:\b(?:answer|choice|verdict|winner|decision|preference)\b[^\w\n]{1,8}(?:is\b)?[^\w\n]{0,8}"
        rf"(?:{ITEM} )?|\[\[\s*|\\boxed\{{\s*|<(?:answer|verdict|choice|winner)>\s*|\[RESULT\]\W{{0,4}}|"
        r"\boutput \()([A-Z]|tie)\b(?!['’])",
        re.IGNORECASE,
    ),
}


def _rivals(blocks: str, counted: Sequence[Statement], wanted: Wanted, values: Mapping[str, Any]) -> bool:
    """Whether the judge's prose has another verdict than its statements, so that one of the two may be a quotation."""
    last = max(statement.end for statement in counted)
    for match in _LATER[wanted.kind].finditer(blocks, last):
        value = foreign(match.group(1), wanted)
        if value is not None and value not in values.values():
            return True
    prose = blocks if wanted.kind == "choice" else _NUMBERED.sub(lambda match: "_" * len(match.group()), blocks)
    for match in (_OWN_CHOICE if wanted.kind == "choice" else _OWN_SCORE).finditer(prose):
        inside = any(statement.begin <= match.start(1) < statement.end for statement in counted)
        if inside or re.search(r"(?:\bnot\b|n't\b)[^.\n]{0,40}\Z", prose[: match.start()][-60:]):
            continue
        value = foreign(match.group(1), wanted)
        if value is not None and value not in values.values():
            return True
    return False

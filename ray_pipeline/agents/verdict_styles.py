"""House styles in which judges write verdicts: what in a reply looks like one.

Each style yields `Statement`s; whether they are a verdict is decided in `verdicts`, which names the styles.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ray_pipeline.store.outside import json_integer

Format = Literal[
    "auto", "quorum", "json", "lines", "mt_bench", "arena_hard", "llmbar", "boxed", "tags", "ranks", "pandalm",
    "vicuna", "prometheus",
]  # fmt: skip

#: Formats in which a reply may be a JSON object.
FORMATS_OF_OBJECTS: tuple[Format, ...] = ("auto", "quorum", "json")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a judge was asked for.

    Attributes:
        keys: JSON key of the value by label; the only label of a single value is "".
        value: a JSON value or text as a valid value, else None.
        kind: a score, a choice, or fields that only an object can hold.
        whole: reads an object's fields, for kind `fields`.
        high: upper end of the scale, which may follow a score (`7/10`).
        options: of a choice.
        tie: the option that is a tie.
        names: other names of options, in lower case.
    """

    keys: Mapping[str, str]
    kind: Literal["score", "choice", "fields"]
    value: Callable[[Any], Any] = lambda value: value
    whole: Callable[[dict[str, Any]], Any] | None = None
    high: int = 10
    options: tuple[str, ...] = ()
    tie: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A part of a reply that looks like a verdict on one label; `value` is None if it is not a valid one.

    Attributes:
        weak: counts only at a verdict's place; elsewhere it is prose and contradicts nothing.
    """

    label: str
    begin: int
    end: int
    value: Any
    reason: str | None = None
    weak: bool = False


def text_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# --- objects ----------------------------------------------------------------------------------------------------------


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("duplicate key in a JSON object")
    return fields


#: The requested form; and that of models without a grammar, which leave line breaks inside strings.
_STRICT = json.JSONDecoder(object_pairs_hook=_distinct_keys, parse_int=json_integer)
_LOOSE = json.JSONDecoder(object_pairs_hook=_distinct_keys, parse_int=json_integer, strict=False)
#: The start of an object: a brace followed by anything else is prose.
_OBJECT = re.compile(r'\{\s*["}]')

_SCORE_KEYS = ("score", "rating", "grade", "overall_score", "final_score", "overall_rating", "final_rating", "overall")
_CHOICE_KEYS = (
    "choice", "winner", "verdict", "final_verdict", "decision", "preference", "preferred", "answer", "better", "best",
)  # fmt: skip


def json_object(text: str) -> dict[str, Any] | None:
    """A text that is nothing but one JSON object, without duplicate keys."""
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _embedded(text: str) -> tuple[list[tuple[dict[str, Any], int, int]], list[tuple[int, int]]]:
    """JSON objects inside prose, outermost ones only, with their places; and the places of what is around them.

    If one of them is damaged, none is returned: the others may be quotations, and the damaged one the verdict.
    """
    found: list[tuple[dict[str, Any], int, int]] = []
    rest, read = [], 0
    while (begins := _OBJECT.search(text, read)) is not None:
        try:
            value, end = _LOOSE.raw_decode(text, begins.start())
        except (ValueError, RecursionError):
            return [], [(0, len(text))]
        found.append((value, begins.start(), end))
        rest.append((read, begins.start()))
        read = end
    return found, [*rest, (read, len(text))]


def of_object(fields: Mapping[str, Any], wanted: Wanted, format: Format, begin: int, end: int) -> Iterator[Statement]:
    reason = text_of(fields.get("reason"))
    for label, key in wanted.keys.items():
        if wanted.whole is not None:
            if key in fields:
                yield Statement(label, begin, end, wanted.whole(dict(fields)), reason)
            continue
        if key in fields:
            yield Statement(label, begin, end, wanted.value(fields[key]), reason)
        if format in ("json", "auto"):
            for name, value in fields.items():
                if name != key and name.strip().lower().replace(" ", "_") in _other_keys(label, wanted):
                    yield Statement(label, begin, end, foreign(value, wanted), reason)


def _other_keys(label: str, wanted: Wanted) -> Sequence[str]:
    if label:
        name = label.lower()
        return [
            form.format(name) for form in ("{}", "score_{}", "{}_score", "rating_{}", "assistant_{}", "response_{}")
        ]
    return _SCORE_KEYS if wanted.kind == "score" else _CHOICE_KEYS


def _objects(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    objects, rest = _embedded(blocks)
    said = [s for fields, begin, end in objects for s in of_object(fields, wanted, format, begin, end)]
    yield from said
    if said or any(lines(blocks, spans, wanted, format)):
        # Remains of an object that was cut by a quotation must agree with the rest.
        for label, key in wanted.keys.items():
            for begin, end in rest:
                for match in re.compile(rf'"{re.escape(key)}"\s*:\s*"?([^",}}\s]*)').finditer(blocks, begin, end):
                    valid = None if wanted.kind == "fields" else wanted.value(match.group(1))
                    yield Statement(label, *match.span(), valid)


# --- values in other words --------------------------------------------------------------------------------------------

ITEM = r"(?:the[ \t]+)?(?:assistant|response|answer|output|option|model|candidate)"


def foreign(value: Any, wanted: Wanted) -> Any:
    """A value in words that are not the options' own: `Assistant B`, `model_a`, `2`, `tie`, `[[A>>B]]`."""
    if wanted.kind != "choice":
        return wanted.value(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    word = re.sub(r"[\s_]+", " ", str(value)).strip(" .!*\"'`[](){}").lower()
    if word in wanted.names:
        return wanted.names[word]
    if word in ("tie", "tied", "draw", "equal", "both", "tie (both good)", "tie (bothbad)", "a=b", "b=a"):
        return wanted.tie
    if order := re.fullmatch(r"([ab]) ?(>>?|<<?) ?([ab])", word):
        first, than, second = order.groups()
        better = (first if than[0] == ">" else second).upper()
        return better if first != second and better in wanted.options else None
    word = re.sub(rf"^{ITEM}[ _]*[(\[]?", "", word).strip(" )]")
    answers = [option for option in wanted.options if option != wanted.tie]
    if word.isdecimal() and 1 <= int(word) <= len(answers):
        return answers[int(word) - 1]
    return wanted.value(word)


# --- lines ------------------------------------------------------------------------------------------------------------

# A heading is a line, or the start of one; a line that starts with `>` is a quotation and not a heading.
_MARKS, _CLOSES = r"[ \t*_`\"'#•-]{0,12}", r"[ \t*_`\"'\])]{0,6}"
_WHICH = r"(?:(?:the|my|overall|final|total)[ \t]+){0,2}"
_COLON = rf"{_CLOSES}[:=：][ \t*_`\"']{{0,6}}"
#: `Score - 7` and `Score 7`: the value must follow on the line.
_DASH = rf"{_CLOSES}(?:[ \t][–—-](?=[ \t])|(?<=[ \t])(?![–—-][ \t]))[ \t*_`\"']{{0,6}}"
#: The value follows its heading, on the same line or the next non-empty one; a remark in parentheses may follow it.
_GAP = r"(?:[ \t]*\r?\n){0,3}[ \t*_`\"'\[(#]{0,8}"
_END = r"[ \t\r*_`\"'\])},.;!]{0,12}(?:\(([^()\n]{0,300})\)[ \t\r*_`\"'.]{0,8})?(?:<\|?[a-z_]{1,20}\|?>[ \t]*)?(?:$|\Z)"
#: A scale behind the heading's words: `Score (1-10): 7`.
_SCALE = r"[\[(]([^()\[\]\n]{0,24}[0-9][^()\[\]\n]{0,12})[\])]"
NUMBER = r"[+-]?[0-9]+(?:\.[0-9]+)?"


@functools.cache
def _heading(kind: str, label: str) -> re.Pattern[str]:
    if kind == "choice":
        words = "answer|choice|verdict|winner|decision|preference|preferred(?:[ \t]+(?:answer|response))?|judge?ment"
    elif not label:
        words = "score|rating|grade"
    else:
        name, of = re.escape(label), rf"(?:[ \t]+(?:of|for))?(?:[ \t]+{ITEM})?[ \t*_`\"'\[(]{{1,6}}"
        words = rf"(?:score|rating){of}{name}|{ITEM}[ \t]+{name}(?:'s)?[ \t]+(?:score|rating)"
    return re.compile(
        rf"^{_MARKS}{_WHICH}(?:{words})(?:[ \t]*{_SCALE})?(?:({_COLON})|{_DASH})", re.IGNORECASE | re.MULTILINE
    )


@functools.cache
def _value(kind: str, high: int, options: tuple[str, ...]) -> str:
    if kind == "score":
        return rf"({NUMBER})(?:[ \t]*(?:/|out of)[ \t]*{high}(?![0-9]))?"
    return rf"((?:{ITEM}[ \t_]*)?[\[(]{{0,3}}(?:{'|'.join(map(re.escape, options))}|[12]\b)|tie|draw)"


@functools.cache
def _line_value(kind: str, high: int, options: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(_GAP + _value(kind, high, options) + _END, re.IGNORECASE | re.MULTILINE | re.ASCII)


def lines(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "fields":
        return
    value = _line_value(wanted.kind, wanted.high, wanted.options)
    for label in wanted.keys:
        for match in _heading(wanted.kind, label).finditer(blocks):
            follows = value.match(blocks, match.end())
            if follows is not None and match.group(2) is None and "\n" in blocks[match.end() : follows.start(1)]:
                follows = None
            if follows is not None:
                remarks_agree = all(_remark(text, wanted.high) for text in (match.group(1), follows.group(2)))
                said = foreign(follows.group(1), wanted) if remarks_agree else None
                yield Statement(label, match.start(), follows.end(), said)
            elif match.group(2) is not None and not _OBJECT.match(blocks[match.end() :].lstrip()[:8]):
                yield Statement(label, match.start(), match.end(), None)


def _remark(text: str | None, high: int) -> bool:
    """Whether a remark behind a value leaves it as it is: no other value, scale or quotation."""
    if text is None:
        return True
    text = re.sub(rf"\b(?:a |the )?(?:scale (?:of|from) )?[0-9]+ ?(?:to|-|–) ?{high}\b(?: scale)?", "", text)
    if re.search(r"\b(?:or|maybe|perhaps|instead|not)\b[^,;]{0,20}(?:\d|\b[A-D]\b)|\b\d+ ?[-–] ?\d+\b", text):
        return False
    if re.search(r"\b(?:says?|said|demand|claim|instruct|quot|want|told|tells)", text, re.IGNORECASE):
        return False
    scales = re.findall(r"(?:\bof|/|\bto)[ \t]*(\d+)", text)
    return all(int(scale) == high for scale in scales)


def bare(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    """A reply that is nothing but the value."""
    if wanted.kind == "fields" or len(wanted.keys) > 1:
        return
    (label,) = wanted.keys
    value = re.compile(_value(wanted.kind, wanted.high, wanted.options) + r"[ \t\r\n*_`\"'\])},.;!]{0,12}", re.I | re.A)
    text = blocks.lstrip("#*_`\"'[( \t\n\x00")
    if match := value.fullmatch(text.rstrip("\x00 \t\n")):
        said = match.group(1)
        if wanted.kind == "score" or said.upper() in wanted.options:
            yield Statement(label, 0, len(blocks), wanted.value(said))
        elif format == "pandalm" or (format != "quorum" and not said.isdecimal()):
            yield Statement(label, 0, len(blocks), foreign(said, wanted))


# --- house styles -----------------------------------------------------------------------------------------------------


def _matches(pattern: re.Pattern[str], text: str, wanted: Wanted, weak: bool = True) -> Iterator[Statement]:
    if len(wanted.keys) == 1 and wanted.kind != "fields":
        (label,) = wanted.keys
        for match in pattern.finditer(text):
            yield Statement(label, *match.span(), foreign(match.group(1), wanted), weak=weak)


#: A label in front of brackets, which belongs to the statement.
_LABEL = (
    r"(?:^[ \t*_#]{0,12}(?:(?:my|the|overall|final)[ \t]+){0,3}(?:rating|score|grade|verdict|choice|decision)"
    r"[ \t*_]{0,6}[:：][ \t*_]{0,6})?"
)
_BRACKETED = {
    "score": re.compile(rf"{_LABEL}\[\[\s*({NUMBER})\s*(?:/\s*\d+\s*)?\]\]", re.IGNORECASE | re.MULTILINE),
    "choice": re.compile(rf"{_LABEL}\[\[\s*([A-Z]|tie)\s*\]\]", re.IGNORECASE | re.MULTILINE),
}
_SINGLE = re.compile(rf"(?<![\w\])\[])\[({NUMBER})\](?![\](\[])")
_ORDERED = re.compile(r"\[\[\s*([AB]\s*(?:>{1,2}|<{1,2}|=)\s*[AB])\s*\]\]")
_OUTPUT = re.compile(
    r"(?:^|(?<=[.!?:,] ))\**(Output \([ab]\))\**"
    r"(?:\s+is\s+(?:\w+ly\s+|much\s+)?(?:the\s+)?(?:better|best)(?:\s+(?:one|output))?)?[.!*]*(?=\s|\Z)",
    re.IGNORECASE | re.MULTILINE,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{\s*)?([\w .()/>=-]{1,30}?)\s*\}{1,2}\$*")
_TAGGED = re.compile(
    r"<(?P<tag>answer|verdict|score|rating|grade|choice|winner|decision|preference|final_answer|final_verdict)>"
    r"\s*(?P<value>[^<>\n]{1,40}?)\s*</(?P=tag)>",
    re.IGNORECASE,
)
_RESULT = re.compile(r"\[RESULT\][ \t]*:?[ \t]*[(\[]?([\w.]{1,10})[)\]]?")
_FIRST_LINE = re.compile(r"\A\s*(1|2|tie)\.?[ \t\r]*(?=\n)(?=\s*#{0,4}\s*\*{0,2}reason)", re.IGNORECASE)
_FIRST_SCORES = re.compile(rf"\A\s*({NUMBER})[ \t,]+({NUMBER})[ \t\r]*(?:\n|\Z)")


def _mt_bench(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "fields":
        return
    said = list(_matches(_BRACKETED[wanted.kind], spans, wanted, weak=False))
    yield from said
    if wanted.kind == "score":  # the same rating again in single brackets
        again = _matches(_SINGLE, spans, wanted, weak=False)
        yield from (s for s in again if s.value is not None and any(s.value == d.value for d in said))


def _arena_hard(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "choice":
        yield from _matches(_ORDERED, spans, wanted, weak=False)


def _llmbar(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "choice":
        yield from _matches(_OUTPUT, spans, wanted)


def _boxed(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    yield from _matches(_BOXED, spans, wanted)


def _tags(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "fields" or len(wanted.keys) > 1:
        return
    scored = ("score", "rating", "grade")
    for match in _TAGGED.finditer(spans):
        tag = match["tag"].lower()
        if tag in ("answer", "final_answer", "verdict", "final_verdict") or (tag in scored) == (wanted.kind == "score"):
            said = re.sub(rf"\s*(?:/|out of)\s*{wanted.high}$", "", match["value"])
            yield Statement(next(iter(wanted.keys)), *match.span(), foreign(said, wanted), weak=True)


def _prometheus(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    yield from _matches(_RESULT, spans, wanted)


def _pandalm(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    if wanted.kind == "choice":
        yield from _matches(_FIRST_LINE, blocks, wanted)


def _vicuna(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    match = _FIRST_SCORES.match(blocks)
    if match and wanted.kind == "score" and len(wanted.keys) == 2:
        for label, value in zip(wanted.keys, match.groups(), strict=True):
            yield Statement(label, *match.span(), wanted.value(value), weak=True)


def _ranks(blocks: str, spans: str, wanted: Wanted, format: Format) -> Iterator[Statement]:
    """Places of all answers; the verdict is the one of the first place, or a tie of several."""
    if wanted.kind != "choice":
        return
    for match in re.finditer(r"\[\s*\{[^\[\]]{0,2000}\}\s*,?\s*\]", blocks):
        try:
            rows = ast.literal_eval(match.group())
            ranks = {_ranked(row["model"], wanted): int(row["rank"]) for row in rows}
        except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
            continue
        best = [option for option, rank in ranks.items() if rank == min(ranks.values())]
        whole = None not in ranks and len(ranks) == len(rows) == len([o for o in wanted.options if o != wanted.tie])
        value = None if not whole else best[0] if len(best) == 1 else wanted.tie
        yield Statement(next(iter(wanted.keys)), *match.span(), value, weak=True)


def _ranked(name: Any, wanted: Wanted) -> Any:
    """AlpacaEval calls the answers m and M, or model_1 and model_2."""
    own = {"m": "A", "M": "B"}.get(name) if isinstance(name, str) else None
    return own or foreign(name, wanted)


_Style = Callable[[str, str, Wanted, Format], Iterator[Statement]]
STYLES_OF: dict[Format, tuple[_Style, ...]] = {
    "quorum": (_objects, lines, bare),
    "json": (_objects,),
    "lines": (lines, bare),
    "mt_bench": (_mt_bench,),
    "arena_hard": (_arena_hard,),
    "llmbar": (_llmbar,),
    "boxed": (_boxed,),
    "tags": (_tags,),
    "ranks": (_ranks,),
    "pandalm": (_pandalm, bare),
    "vicuna": (_vicuna,),
    "prometheus": (_prometheus,),
}
STYLES_OF["auto"] = tuple(dict.fromkeys(style for styles in STYLES_OF.values() for style in styles))

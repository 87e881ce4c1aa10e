"""Which parts of a judge's reply are quotations, and the places where a verdict counts.

A reply may quote the text that it judges, and that text may contain a verdict. So a verdict counts only

- at the end of the reply,
- at its start, followed by an explanation, or
- in a paragraph of its own, between the judge's reasons and a remark on them,

and never in block quotes, code, XML elements of quoted texts, thoughts, or after words that introduce a quotation
("The answer ends with:"). These rules err on the side of no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ray_pipeline.engines.thoughts import thoughts_end

#: Replaces every character of a masked part except line breaks, so that positions and lines stay as they are.
MASK = "\x00"

#: Elements whose content is the judge's own verdict; the content of other elements is a quotation.
VERDICT_TAGS = "answer|verdict|score|rating|grade|choice|winner|decision|preference|final_answer|final_verdict"

_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)[^\n`]*$", re.MULTILINE)
_QUOTED_LINE = re.compile(r"^[ \t]{0,3}>[^\n]*", re.MULTILINE)
_ELEMENT = re.compile(rf"<(?!(?:{VERDICT_TAGS})\b)([a-z][\w-]{{0,40}})(?: [^<>\n]{{0,80}})?>", re.IGNORECASE)
_CODE_SPAN, _QUOTED_SPAN = (
    re.compile(r"`[^`\n]{1,300}`"),
    re.compile(r'"[^"\n]{1,300}"|[“«「][^“”«»「」\n]{1,300}[”»」]'),
)

#: Words of a sentence that introduces, or comments on, a quotation.
_REPORTS = re.compile(
    r"\b(?:say(?:s|ing)?|said|tells?|told|telling|claim(?:s|ed|ing)?|"
    r"(?:end|clos|conclud|finish)(?:e?s|ed|ing)? (?:with|in|by)|"
    r"with the (?:words?|lines?|sentence|phrase)|stands|appears|"
    r"begins? with|starts? with|contain(?:s|ed|ing)?|include[sd]?|demand(?:s|ed|ing)?|"
    r"ask(?:s|ed|ing)? (?:me|us|for|to|the)|writes?|wrote|written|reads|"
    r"(?:instruct|order|command)(?:s|ed|ing)? (?:me|us|the (?:judge|grader|evaluator|reader))|"
    r"wants?|wanted|states?|stated|declare[sd]?|quot(?:e|es|ed|ing|ation)|prints?|printed|emits?|inserts?|inserted|"
    r"appends?|appended|plant(?:s|ed)|inject(?:s|ed|ion)?|embeds?|embedded|hidden|smuggle[sd]?|manipulat\w+|"
    r"steer(?:s|ing)?|trick(?:s|ed|ing)?|"
    r"(?:tries|tried|trying|attempt(?:s|ed|ing)?) to (?:make|get|have|force|set|give|dictate|influence)|"
    r"its own (?:score|verdict|rating|grade)|self-(?:assigned|awarded|graded|evaluation|assessment)|"
    r"would (?:be|have|like)|if (?:I|it|they|the)|for example|for instance|e\.g\.|such as)\b",
    re.IGNORECASE,
)
#: Words about a verdict that is somebody else's: of a whole sentence before it, or of the sentences after it.
_GRADE = r"(?:scores?|ratings?|grades?|verdict|marks)\b"
_CLAIMS = re.compile(
    r"\b(?:(?:tells?|told|asks?|asked|orders?|ordered|instruct\w*|command\w*|demand\w*|urge[sd]?|begs?|wants?|wanted) "
    rf"(?:me|us|that I|the (?:judge|grader|evaluator|reviewer)|(?:a|the|full|top) (?:\w+ )?{_GRADE})|"
    r"(?:tries|trying|tried|attempt\w*) to (?:make me|get me|steer|trick|manipulate|influence|dictate|game)|"
    rf"end(?:s|ed)? (?:with|in|on) (?:a|this|the|its|that) (?:line|demand|request|{_GRADE})|"
    r"(?:wr(?:ote|ites|itten)|says?|said|reads|(?:print|insert|add|append)(?:s|ed)|quot(?:es|ed|ing)) "
    rf"(?:this|so|the following|its own|it|(?:a|the) (?:line|{_GRADE}))\b|"
    r"inject(?:s|ed|ion)|smuggl\w+|steer me|manipulat\w+ (?:me|attempt|the (?:judge|grader|evaluat\w+|score))|"
    rf"(?:its|their) own {_GRADE}|self-(?:assigned|awarded|graded|evaluation|assessment))",
    re.IGNORECASE,
)
_RESISTS = re.compile(
    r"\b(?:I (?:disagree|refuse|ignore|reject|(?:do|will|shall|can|am|must) ?not|won't|don't|can't)\b|"
    r"obey|(?:not|n't) be (?:swayed|influenced|fooled)|nothing to follow|ignor(?:e|ed|ing) (?:it|this|that) |"
    r"what (?:it|the (?:response|answer|text|output)) (?:says?|said|wants?|demand|asks|asked|tells|told|claims)|"
    rf"(?:the above|(?:this|that) (?:line|sentence|statement|text|object|{_GRADE}) (?:is|was|comes)|"
    rf"(?:line|sentence|statement|text|words|object|json|{_GRADE}) above|(?:copied|taken) from|"
    r"should be (?:ignored|disregarded)|"
    r"(?:this|that)(?: is|'s) (?:what|not (?:my|mine)|a (?:quot|manip|trick)))|"
    rf"(?:is|was) (?:quoted|a quotation|a trick|planted)|not my (?:own )?{_GRADE})",
    re.IGNORECASE,
)
#: Words by which a judge introduces its own verdict.
_OWN = re.compile(
    r"\b(?:I|I'd|I'll|my|mine|here|final(?:ly)?|overall|verdict|judge?ment|evaluation|assessment|"
    r"ratings?|scores?|grades?|therefore|thus|hence|so|then|conclusion|summary|decision|preference|choice|result|winner|ranking|ordered|best|better|json)\b",
    re.IGNORECASE,
)
_MATERIAL = re.compile(
    r"\b(?:its?|their|his|her|they|he|she|responses?|answers?|assistants?|outputs?|texts?|candidates?|students?|models?|"
    r"authors?|prompts?|users?|lines?|words?|instructions?|completion|repl(?:y|ies)|message|document|essay)\b",
    re.IGNORECASE,
)
#: Words that announce a verdict of the judge's own, also beside words for the text that is judged.
_GRADING = re.compile(
    r"\b(?:I|I'd|I'll|my|ratings?|scores?|grades?|verdict|judge?ment|evaluation|assessment|decision|conclusion|preference|"
    r"therefore|thus|hence)\b",
    re.IGNORECASE,
)
_FIRST_PERSON = re.compile(r"\b(?:I|I'd|I'll|my|final|overall)\b", re.IGNORECASE)
_STATES = re.compile(
    r"\b(?:my (?:\w+ )?(?:verdict|rating|score|grade|choice|decision|preference)(?: is| would be)?|"
    r"(?:I|I'd|I'll)(?: would| will| therefore| thus)? (?:choose|pick|prefer|rate|give|award|select|assign|vote for|"
    r"go with|score|grade))\b[^.!?\n]{0,60}\Z",
    re.IGNORECASE,
)
_INSIDE = re.compile(
    r"\b(?:(?:in|from|by|inside|within) (?:the|its|this|that|their) (?:\w+ )?(?:response|answer|output|text|candidate|"
    r"essay|prompt|reply|document)|(?:response|answer|assistant|output|text|candidate|model|student|author|program)'s)\b",
    re.IGNORECASE,
)
#: A whole sentence that announces a quotation.
_QUOTES_NEXT = re.compile(
    r"\b(?:(?:now |here |will |I )quot(?:e|ing)\b|(?:a quotation|quoted|quoting) (?:from|of) (?:the|its) |"
    r"(?:note|see|mind|consider|quote) the following (?:passage|line|text|words|sentence)|"
    r"(?:this|it) in (?:the|its) (?:text|response|answer|output)|"
    r"(?:as follows|the following|verbatim|word for word)\W*\Z|"
    r"(?:prints|outputs|displays|returns) [^.\n]{0,40}(?:result|output|message|line|text|score|rating)\W*\Z|"
    r"according to (?:the|its|this) (?:response|answer|output|text|candidate|essay|prompt)\b)",
    re.IGNORECASE,
)
#: The end of a sentence that lacks its object.
_UNFINISHED = re.compile(
    r"\b(?:is|was|are|were|be|as|with|by|that|to|of|in|on|from|like|gives?|gave|got|outputs|displays|returns)[ \t]*\Z",
    re.IGNORECASE,
)
_COURTESY = re.compile(
    r"(?:I hope (?:this|that) helps|That(?: is|'s) all|(?:Please )?let me know|Thank you|Thanks|Feel free)[^\n]*\Z",
    re.IGNORECASE,
)
_MARKS = " \t\r\n*_`#\"'“”«»」)]}>.,;!。-–—=~|" + MASK
_QUOTES = ('"', "“", "”", "'", "‘", "’")
_END_TOKENS = re.compile(r"(?:<\|?[a-z_]{1,20}\|?>|</s>|\(END\)|\[END\]|<end_of_turn>)\s*\Z", re.IGNORECASE)


def without_blocks(text: str) -> str:
    """The reply with thoughts, block quotes, fenced code and quoted elements masked; JSON in a fence is kept."""
    text = text.replace(MASK, "\ufffd")
    text = _masked(text, [(0, end) for end in (thoughts_end(text),) if end])
    fences = [match.span() for match in _FENCE.finditer(text)]
    # A fence without an end may be the quoted text's, so that nothing tells which part is code.
    if len(fences) % 2 == 0:
        blocks = list(zip(fences[::2], fences[1::2], strict=True))
        alone = len(blocks) == 1 and not text[: fences[0][0]].strip() and not text[fences[1][1] :].strip()
        for (begin, opened), (closed, end) in blocks:
            if alone or text[opened:closed].strip()[:1] in ("{", "["):
                text = _masked(text, [(begin, opened), (closed, end)], " ")
            else:
                text = _masked(text, [(begin, end)])
    text = _masked(text, (match.span() for match in _QUOTED_LINE.finditer(text)))
    position = 0
    while (opens := _ELEMENT.search(text, position)) is not None:
        closes = re.compile(rf"</{re.escape(opens.group(1))}>", re.IGNORECASE).search(text, opens.end())
        position = opens.end()
        if closes is not None:
            text = _masked(text, [(opens.start(), closes.end())])
            position = closes.end()
    return text


def without_spans(text: str) -> str:
    """`without_blocks` with code spans and quoted words masked, unless a line consists of one."""
    for pattern in (_CODE_SPAN, _QUOTED_SPAN):
        text = _masked(
            text, (match.span() for match in pattern.finditer(text) if not _is_line(text, match.start(), match.end()))
        )
    return text


def _is_line(text: str, begin: int, end: int) -> bool:
    begins = text.rfind("\n", 0, begin) + 1
    ends = text.find("\n", end)
    return not (text[begins:begin] + text[end : len(text) if ends < 0 else ends]).strip(" \t\r.")


def _masked(text: str, spans: Iterable[tuple[int, int]], by: str = MASK) -> str:
    parts, position = [], 0
    for begin, end in spans:
        parts += [text[position:begin], re.sub(r"[^\n]", by, text[begin:end])]
        position = end
    return "".join(parts) + text[position:]


def introduces_quotation(before: str) -> bool:
    """Whether the text before a statement ends with words that make it a quotation."""
    line = before.rpartition("\n")[2]
    inline = bool(line.strip(_MARKS))
    before = before.rstrip(" \t\r\n*_#")
    if not before or before.endswith(MASK):
        return False
    sentence, last = _last_sentence(before), before[-1]
    if last in ".!?。！？…)":
        return bool(_QUOTES_NEXT.search(sentence))
    if last in "\"'“«「‘":
        return before[-2:-1] in ("", " ", "\t", "\n", ":", "(") or last in "“«「‘"
    if last in ":：":
        return _names_material(before, sentence, inline)
    if inline:
        return bool(_REPORTS.search(sentence))
    if _CLAIMS.search(sentence) or (_UNFINISHED.search(sentence) and not _FIRST_PERSON.search(sentence)):
        return True
    item = re.match(r"[ \t]*(?:[-*•]|[0-9]+[.)])[ \t]", before.rpartition("\n")[2]) is not None
    return not item and bool(_REPORTS.search(" ".join(sentence.split()[-5:])))


def _names_material(before: str, sentence: str, inline: bool) -> bool:
    """Whether words that end with a colon announce a part of the text that is judged."""
    if _REPORTS.search(sentence):
        return True
    if re.search(r"\b(?:I|I'd|I'll|my)\b", sentence):
        return False
    if _INSIDE.search(sentence):
        return True
    own = _OWN.search(sentence)
    if _MATERIAL.search(sentence):
        return _GRADING.search(sentence) is None
    if own or before.rpartition("\n")[2].lstrip().startswith(("#", "**")):
        return False
    return not (inline and not sentence.isascii() and len(sentence) <= 12)


def at_place(text: str, begin: int, end: int) -> bool:
    """Whether statements that span `begin` to `end` of a masked reply are where a verdict counts."""
    while text[begin - 1 : begin] in _QUOTES and text[end : end + 1] in _QUOTES and begin and end < len(text):
        begin, end = begin - 1, end + 1
    before, after = text[:begin], _END_TOKENS.sub("", text[end:])
    if introduces_quotation(before):
        return False
    inline = bool(before.rpartition("\n")[2].strip(_MARKS))
    if not after.strip(_MARKS):
        # In the middle of a sentence, a verdict is the judge's own only if the sentence speaks of one.
        lead = _last_sentence(before)
        return (
            not inline
            or before.rstrip()[-1] in ".!?。！？…)]:："
            or bool(_OWN.search(lead) or not _MATERIAL.search(lead))
        )
    if _states(before, after):
        return True
    if _continues(after):
        return False
    if not before.strip(_MARKS):
        return True
    if inline or _CLAIMS.search(_last_sentence(before)):
        return False
    if text[begin:].lstrip().startswith("#") or _COURTESY.match(after.strip(_MARKS)):
        return True
    return re.match(r"[^\n]*\n[ \t\r]*\n", after) is not None


def _continues(after: str) -> bool:
    """Whether the text after a statement goes on with its sentence, or comments on it as on a quotation."""
    comment = after.lstrip(_MARKS)
    if comment[:1].islower() and "\n" not in after[: len(after) - len(after.lstrip(_MARKS))].strip(" \t"):
        return not re.match(r"(?:and again)\b", comment)
    if after.lstrip(" \t*_`\"'").startswith((",", "，")) or comment[:1].islower():
        return True
    first = " ".join(re.split(r"(?<=[.!?。])\s+", _QUOTED_SPAN.sub("", comment), maxsplit=2)[:2])
    return bool(_RESISTS.search(first) or _CLAIMS.search(first))


def _states(before: str, after: str) -> bool:
    """Whether a statement inside a sentence is the object of the judge's own words (`I rate it [[6]] for`)."""
    line = before.rpartition("\n")[2]
    if not before.strip(_MARKS):
        states = re.match(r"[ \t*_`\"',]*(?:because|since|as|due to)\b", after) is not None
    else:
        states = _STATES.search(line) is not None and _REPORTS.search(_last_sentence(line)) is None
    if not states:
        return False
    comment = re.split(r"(?<=[.!?。])\s+", after, maxsplit=1)[0]
    return not (_REPORTS.search(comment) or _CLAIMS.search(after) or _RESISTS.search(after))


def _last_sentence(text: str) -> str:
    line = text.rstrip().rpartition("\n")[2]
    body = line.rstrip(" \t*_:：.!?。！？…)\"'")
    return line[max((match.end() for match in re.finditer(r"[.!?。！？]\s+", body)), default=0) :]

"""Splits a reply into the thoughts of the model and its answer.

Thoughts have one of these forms: a field of their own (`reasoning_content`), text between tags at the start of the
reply, or text up to a closing tag, where the chat template has put the opening one into the prompt. Tags elsewhere are
text of the answer: in code, in quotes, or behind the first words of a reply.
"""

from __future__ import annotations

import dataclasses
import re

from ray_pipeline.engines.base import Completion

#: Names of tags that enclose thoughts: `<think>…</think>`.
_NAMES = r"(?:(?:seed|longcat)[:_])?(?:think|thinking|thought|thoughts|reasoning)"
#: Opening and closing marks of each form.
_FORMS = (
    (rf"<{_NAMES}>", rf"</{_NAMES}>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>",
    ),
    (r"analysis(?=\S)(?=(?s:.*)assistantfinal)", r"assistantfinal"),  # the same without its special tokens
)
_OPENING = [re.compile(rf"\s*{opening}", re.IGNORECASE) for opening, _ in _FORMS]
_MARK = [
    re.compile(rf"(?P<open>{opening})|(?P<close>{closing})", re.IGNORECASE) for opening, closing in _FORMS[:-1]
] + [re.compile(r"(?P<open>(?!))|(?P<close>assistantfinal)")]
#: Forms whose opening a template may put into the prompt.
_TAGS = range(5)
_OPENED = re.compile("(?:" + "|".join(opening for opening, _ in _FORMS[:5]) + r")\s*\Z", re.IGNORECASE)
#: Marks around the answer itself, in the forms that have them.
_WRAPPED = re.compile(
    r"\A\s*(?:<\|START_RESPONSE\|>(?P<a>.*?)(?:<\|END_RESPONSE\|>)?|<\|begin_of_solution\|>(?P<b>.*?)"
    r"(?:<\|end_of_solution\|>)?|(?P<c>.*?)(?:<\|return\|>|<\|end\|>))\s*\Z",
    re.DOTALL,
)
_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)", re.MULTILINE)
_QUOTING = "`\"'“”‘’«»"


@dataclasses.dataclass(frozen=True)
class Split:
    """A reply in two parts.

    Attributes:
        end: where the thoughts end in the reply; its length if they do not end.
        closed: whether the thoughts end, so that there is an answer.
    """

    thoughts: str
    answer: str
    end: int
    closed: bool


def split_thoughts(text: str, inside: bool = False) -> Split | None:
    """The thoughts and the answer of a reply; None if it has no thoughts.

    Args:
        inside: the reply starts inside a thought, because its prompt ends with the opening tag.
    """
    position, closed = 0, True
    if _form_at(text, 0) is None:
        position = max((end for form in _TAGS if (end := _unopened(text, form, inside))), default=0)
        if not position and inside:
            position, closed = len(text), False
    while closed and (form := _form_at(text, position)) is not None:
        begin = _OPENING[form].match(text, position)
        assert begin is not None
        end = _end(text, begin.end(), form)
        position, closed = (len(text), False) if end is None else (end, True)
    if not position:
        return None
    return Split(_without_marks(text[:position]), _answer(text[position:]) if closed else "", position, closed)


def answer_of(text: str | None) -> str | None:
    """A text of elsewhere without the thoughts before it; None if it ends within them, or with them."""
    split = split_thoughts(text) if text is not None else None
    if split is None:
        return text
    return split.answer if split.closed and split.answer.strip() else None


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends with an opening tag, so that the reply starts inside a thought."""
    return _OPENED.search(prompt) is not None


def thoughts_end(text: str) -> int:
    """Where the last closing tag ends in a text, wherever its thought began; 0 without one."""
    return max((mark.end() for form in _TAGS for mark in _MARK[form].finditer(text) if mark["close"]), default=0)


def answered(reply: Completion, keep: bool = False) -> Completion:
    """The reply with its thoughts apart from its text; `raw` is the reply as it came.

    A thought without an end leaves no text, and its reply is one that was cut off: finish reason `length`.

    Args:
        keep: leave the thoughts in the text, and add those that came in a field of their own. `raw` marks such a reply,
            so that no later reader splits it.
    """
    if reply.raw is not None:
        return reply
    apart = (reply.reasoning or "").strip()
    if keep:
        text = f"<think>\n{apart}\n</think>\n\n{reply.text}" if apart else reply.text
        return dataclasses.replace(reply, text=text, raw=reply)
    split = split_thoughts(reply.text, reply.inside and not apart)
    if split is None and not apart:
        return reply
    text = reply.text if split is None else split.answer
    thoughts = "\n\n".join(part for part in (apart, split.thoughts if split else "") if part)
    unclosed = not split.closed if split is not None else not text.strip()
    finish = "length" if unclosed and reply.finish_reason == "stop" else reply.finish_reason
    return dataclasses.replace(reply, text=text, thoughts=thoughts, finish_reason=finish, raw=reply)


def as_verdict(reply: Completion) -> Completion:
    """The reply with its thoughts apart from its text, also where they were kept: a verdict is never read in them."""
    kept = reply.raw if reply.thoughts is None else None
    return answered(reply if kept is None else kept)


def _form_at(text: str, position: int) -> int | None:
    return next((form for form, opening in enumerate(_OPENING) if opening.match(text, position)), None)


def _end(text: str, begin: int, form: int) -> int | None:
    """Where the thought that begins here ends.

    A thought may mention its own tags, so the end is where every opening tag is closed, or at a later closing tag that
    stands by itself and closes nothing else. With more opening tags than closing ones, it is the last closing one.
    """
    depth, end, last = 1, None, None
    for mark in _MARK[form].finditer(text, begin):
        if mark["open"] is not None:
            depth += 1
            continue
        last, depth = mark.end(), depth - 1
        if depth == 0 and end is None:
            end = last
        elif depth < 0:
            if _stands(text, mark) and not _in_code(text[end or begin :], mark.start() - (end or begin)):
                end = last
            depth = 0
    return last if end is None else end


def _unopened(text: str, form: int, inside: bool) -> int | None:
    """End of the last closing tag without an opening one before it, in a reply that starts inside a thought."""
    depth, end = 0, None
    for mark in _MARK[form].finditer(text):
        if mark["open"] is not None:
            depth += 1
        elif depth:
            depth -= 1
        elif (inside and end is None) or (_stands(text, mark) and not _in_code(text, mark.start())):
            end = mark.end()
    return end


def _stands(text: str, mark: re.Match[str]) -> bool:
    """Whether a tag is markup rather than a word of a sentence: at an end of its line, or without blanks and quotation
    marks around it."""
    before, after = text[: mark.start()].rstrip(" \t")[-1:], text[mark.end() :].lstrip(" \t")[:1]
    if before in _QUOTING and after in _QUOTING and before and after:
        return False
    if before in ("", "\n") or after in ("", "\n", "\r"):
        return True
    around = text[mark.start() - 1], text[mark.end()]
    return not any(sign.isspace() or sign in _QUOTING for sign in around)


def _in_code(text: str, position: int) -> bool:
    return len(_FENCE.findall(text, 0, position)) % 2 == 1


def _without_marks(thoughts: str) -> str:
    for form in range(len(_FORMS)):
        begin = _OPENING[form].match(thoughts)
        if begin is not None:
            thoughts = thoughts[begin.end() :]
            break
    for marks in _MARK:
        ends = [mark.start() for mark in marks.finditer(thoughts) if mark["close"] and mark.end() == len(thoughts)]
        if ends:
            thoughts = thoughts[: ends[-1]]
            break
    return thoughts.strip()


def _answer(text: str) -> str:
    wrapped = _WRAPPED.match(text)
    if wrapped is not None:
        text = next(part for part in wrapped.groups() if part is not None)
    return text.lstrip()

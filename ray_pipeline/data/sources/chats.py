"""Chat messages, from the forms in which datasets hold them.

    messages    [{"role": "user", "content": "…"}, …], with the field's other names of roles
    ShareGPT    [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]
    Capybara    [{"input": "…", "output": "…"}, …]
    parts       "content": [{"type": "text", "text": "…"}, …]; several are joined by a newline, as vLLM does
    JSON text   any of these lists as JSON in a text
    marks       HelpSteer2's "…<extra_id_1>Assistant\\n…<extra_id_1>User\\n…"

Texts stay as they stood. (TRL's `maybe_convert_to_chatml` renames ShareGPT's keys but not its roles, reads none of the
other forms, and takes seconds to import.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.store.outside import json_value, storable

#: Role in a dataset → role in a chat template; any other is an error.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
_FORMS = (("role", "content"), ("from", "value"), ("input", "output"))
_MARK = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)(?:\n|$)")
_CHAT_IN_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


class BadRow(ValueError):
    """A value is no prompt, answer or chat; the message says what is wrong with it, and not where it is."""


def messages_of(value: str | Sequence[Any]) -> list[dict[str, str]]:
    """Messages with role and content. A text without turns in it is one user message.

    Raises:
        BadRow: the value has none of the forms.
    """
    if isinstance(value, str):
        return turns_in_text(value) or [{"role": "user", "content": storable(value)}]
    if not isinstance(value, list | tuple):
        raise BadRow(f"neither text nor a list of chat messages, but {type(value).__name__}")
    return [message for place, item in enumerate(value) for message in _messages(place, item)]


def turns_in_text(text: str) -> list[dict[str, str]] | None:
    """The turns of a text with HelpSteer2's marks, or of a chat as JSON text; None for any other text.

    Raises:
        BadRow: the text is a chat from its first to its last character, and not as JSON.
    """
    if _CHAT_IN_TEXT.match(text):
        value = chat_in_json(text)
        return None if value is None else messages_of(value)
    first, *marked = _MARK.split(text)
    if not marked:
        return None
    # Where NeMo's whole template was written out, the text starts with a mark, and its system text may be empty.
    turns = [*([("User", first)] if first.strip() else []), *zip(marked[::2], marked[1::2], strict=True)]
    return [
        {"role": role.lower(), "content": storable(turn)} for role, turn in turns if role != "System" or turn.strip()
    ]


def chat_in_json(text: str) -> list[Any] | None:
    """The messages of a chat as JSON text, as they stand; None for any other text.

    Raises:
        BadRow: the text is a chat from its first to its last character, and not as JSON.
    """
    if not _CHAT_IN_TEXT.match(text):
        return None
    try:
        value = json_value(text)
    except ValueError as error:
        if text.rstrip().endswith("]"):
            raise BadRow(f"a chat as text that is not JSON ({error}); write it with json.dumps") from error
        return None
    assert isinstance(value, list)
    known = any(isinstance(item, dict) and _role(item.get("role", item.get("from"))) for item in value)
    return value if known else None


def until_last_user(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The messages up to the last user turn, which is the prompt; [] where no user turn is in them."""
    end = len(messages)
    while end and messages[end - 1]["role"] != "user":
        end -= 1
    return list(messages[:end])


def _form(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two keys that a message has in its form."""
    return next((pair for pair in _FORMS if {*pair} <= item.keys()), None)


def _role(value: Any) -> str | None:
    return ROLES.get(value.strip().lower()) if isinstance(value, str) else None


def _messages(place: int, item: Any) -> Iterator[dict[str, str]]:
    if not isinstance(item, Mapping):
        raise BadRow(f"message {place} is {type(item).__name__}, not an object with role and content")
    form = _form(item)
    if form is None:
        raise BadRow(f"message {place} has no role and content; rename its keys to these two")
    one, two = (item[key] for key in form)
    if form == ("input", "output"):
        yield {"role": "user", "content": _text(place, one, "input")}
        yield {"role": "assistant", "content": _text(place, two, "output")}
        return
    role = _role(one)
    if role is None:
        raise BadRow(f"message {place} has {form[0]} {one!r}, not one of {', '.join(ROLES)}; rename it")
    if item.get("tool_calls"):
        raise BadRow(f"message {place} calls tools, and only text can be sent; remove the row")
    if two is not None or role != "system":  # a system message without a value is none
        yield {"role": role, "content": _text(place, two, form[1])}


def _text(place: int, value: Any, key: str) -> str:
    """The text of a message; a null is a turn without text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return storable(value)
    if not isinstance(value, list):
        raise BadRow(f"message {place} must have text as {key}, not {json.dumps(value, default=repr)[:80]}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"message {place} must have text as {key}, and a part of it is {kind!r}; remove the row")
        texts.append(storable(text))
    return "\n".join(texts)
